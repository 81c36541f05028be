"""The web monitor sends the state of a run, follows it across restarts, and bounds the cost of slow viewers."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp.http_websocket import WebSocketWriter
from aiohttp.test_utils import TestServer

from pillsnap.errors import UserError
from pillsnap.monitor import hub as hub_module
from pillsnap.monitor import server as server_module
from pillsnap.monitor.hub import RunHub, Viewer, list_runs
from pillsnap.monitor.server import make_app, serve
from pillsnap.observe.events import EventLog


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "POLL_INTERVAL_S", 0.02)
    monkeypatch.setattr(server_module, "MACHINE_INTERVAL_S", 0.1)
    monkeypatch.setattr(server_module, "CATCH_UP_INTERVAL_S", 0.02)


def begin(log: EventLog, run_id: str = "r1") -> None:
    log.write("run", run_id=run_id, name=run_id, stage=3, config={}, manifest_hash="h", num_workers=1, versions={})
    log.write("task", task="detection", status="started", epochs=2, steps_per_epoch=100)


def steps(log: EventLog, first: int, last: int, loss: float = 1.0) -> None:
    for step in range(first, last + 1):
        log.write("step", task="detection", epoch=1, step=step, loss=loss / step, images_per_s=50.0)


@asynccontextmanager
async def running(run_dir: Path) -> AsyncIterator[TestServer]:
    async with TestServer(make_app(run_dir)) as server:
        yield server


@asynccontextmanager
async def viewing(server: TestServer, run: str | None = None) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
    async with aiohttp.ClientSession() as session:
        url = server.make_url("/ws").update_query({"run": run} if run else {})
        async with session.ws_connect(url, max_msg_size=0) as viewer:
            yield viewer


class Client:
    """Applies the messages as the page does."""

    def __init__(self, viewer: aiohttp.ClientWebSocketResponse) -> None:
        self.viewer = viewer
        self.view: dict[str, Any] = {}
        self.curves: dict[str, list[list[float]]] = {}
        self.context: dict[str, Any] = {}
        self.num_snapshots = 0

    async def receive(self) -> None:
        message = await self.viewer.receive_json(timeout=20)
        if message["type"] in ("hello", "context"):
            self.context = message
            return
        if message["type"] == "snapshot":
            self.num_snapshots += 1
            self.curves = {}
        self.view = message["view"]
        for name, change in message["curves"].items():
            kept = [point for point in self.curves.get(name, []) if point[0] < change["from"]]
            self.curves[name] = kept + change["points"]

    async def until_step(self, step: int) -> None:
        while self.view.get("tasks", {}).get("detection", {}).get("step") != step:
            await self.receive()


def test_snapshot_updates_and_restart(tmp_path: Path) -> None:
    async def scenario() -> None:
        with EventLog(tmp_path / "a") as log:
            begin(log)
            steps(log, 1, 40)
            async with running(tmp_path / "a") as server, viewing(server) as viewer:
                client = Client(viewer)
                await client.until_step(40)
                assert client.context["run"] == "a"
                assert client.curves["detection/loss"] == [[step, float(f"{1 / step:.6g}")] for step in range(1, 41)]
                steps(log, 41, 60)
                log.write("quarantine", task="detection", sample_id="x", reason="torn")
                begin_s = time.monotonic()
                await client.until_step(60)
                assert time.monotonic() - begin_s < 10 and client.num_snapshots == 1
                log.write("task", task="detection", status="started", epoch=0, step=30)
                steps(log, 31, 50, loss=2.0)
                await client.until_step(50)
                assert client.view["num_quarantined"] == 1 and client.view["tasks"]["detection"]["restarts"] == 1
                expected = [[s, float(f"{(1 if s <= 30 else 2) / s:.6g}")] for s in range(1, 51)]
                assert client.curves["detection/loss"] == expected

    asyncio.run(scenario())


def test_list_of_runs_and_another_run_in_the_same_directory(tmp_path: Path) -> None:
    async def scenario() -> None:
        for name, last in (("a", 5), ("b", 7)):
            with EventLog(tmp_path / name) as log:
                begin(log, name)
                steps(log, 1, last)
        os.utime(tmp_path / "a" / "events.jsonl", (1, 1))
        (tmp_path / "not a run").mkdir()
        assert [run["name"] for run in list_runs(tmp_path)] == ["b", "a"]
        async with running(tmp_path / "a") as server, viewing(server, "b") as viewer:
            client = Client(viewer)
            await client.until_step(7)
            assert client.view["run"]["run_id"] == "b"
            with EventLog(tmp_path / "b") as log:
                begin(log, "b2")
                steps(log, 1, 3)
            await client.until_step(3)
            assert client.view["run"]["run_id"] == "b2" and len(client.curves["detection/loss"]) == 3
            (tmp_path / "b" / "events.jsonl").unlink()
            with EventLog(tmp_path / "b") as log:
                begin(log, "b3")
                steps(log, 1, 2)
            await client.until_step(2)
            assert client.view["run"]["run_id"] == "b3" and client.num_snapshots == 3
        async with running(tmp_path / "a") as server, aiohttp.ClientSession() as session:
            for name in ("..", "nothing", "../a", "/etc", "not a run"):
                async with session.get(server.make_url("/ws").update_query({"run": name})) as answer:
                    assert answer.status == 404

    asyncio.run(scenario())


def test_finished_run_and_a_directory_without_a_log(tmp_path: Path) -> None:
    async def scenario() -> None:
        (tmp_path / "empty").mkdir()
        with EventLog(tmp_path / "done") as log:
            begin(log)
            log.write("verdict", met=False, targets={"top1": {"target": 0.85, "value": None, "met": False}})
        async with running(tmp_path / "empty") as server:
            async with viewing(server) as viewer:
                client = Client(viewer)
                while not client.view:
                    await client.receive()
                assert client.view["status"] == "waiting"
            async with viewing(server, "done") as viewer:
                client = Client(viewer)
                while not client.view:
                    await client.receive()
                assert client.view["status"] == "missed"
                while not client.context.get("machine"):
                    await client.receive()
                assert client.context["machine"]["host_memory_total_bytes"] > 0

    asyncio.run(scenario())


class FakeConnection:
    """A connection with `pending` unsent bytes."""

    def __init__(self) -> None:
        self.pending, self.sent, self.closing = 0, list[bytes](), False

    def write(self, data: bytes) -> None:
        self.sent.append(data)
        self.pending += len(data)

    def get_write_buffer_size(self) -> int:
        return self.pending

    def is_closing(self) -> bool:
        return self.closing


def test_slow_viewer_gets_no_updates_before_a_snapshot(tmp_path: Path) -> None:
    async def scenario() -> None:
        hub, connection = RunHub(tmp_path), FakeConnection()
        viewer = Viewer(connection)
        hub.viewers.add(viewer)
        hub.broadcast({"type": "update"})
        assert not connection.sent  # before the first snapshot
        viewer.begin("x" * 500_000)
        connection.pending = 500_000  # still being sent
        for number in range(1000):
            hub.broadcast({"type": "update", "number": number, "text": "x" * 1000})
        assert viewer.behind.is_set() and not viewer.has_caught_up()
        assert 0 < connection.pending - 500_000 - hub_module.MAX_PENDING_BYTES < 2000
        connection.pending = 0
        hub.broadcast({"type": "update"})
        assert not connection.pending and viewer.has_caught_up()
        viewer.begin("")
        connection.closing = True
        hub.broadcast({"type": "update"})
        assert not connection.pending

    asyncio.run(scenario())


def test_viewer_that_is_behind_gets_one_new_snapshot(tmp_path: Path) -> None:
    async def scenario() -> None:
        with EventLog(tmp_path) as log:
            begin(log)
            steps(log, 1, 5)
            async with running(tmp_path) as server, viewing(server) as viewer:
                client = Client(viewer)
                await client.until_step(5)
                assert server.app is not None
                (watched,) = server.app[server_module.MONITOR].hubs[tmp_path.name].viewers
                watched.behind.set()
                while client.num_snapshots < 2:
                    await client.receive()
                assert client.view["tasks"]["detection"]["step"] == 5
                steps(log, 6, 9)
                await client.until_step(9)
                assert client.num_snapshots == 2 and len(client.curves["detection/loss"]) == 9

    asyncio.run(scenario())


@pytest.mark.parametrize("length", [0, 125, 126, 65_535, 65_536, 200_000])
def test_frame_equals_that_of_aiohttp(length: int) -> None:
    class Protocol:
        _paused = False

    async def scenario() -> None:
        connection, text = FakeConnection(), "ä" * (length // 2) + "x" * (length % 2)
        writer = WebSocketWriter(Protocol(), connection, use_mask=False)  # type: ignore[arg-type]
        await writer.send_frame(text.encode(), aiohttp.WSMsgType.TEXT)
        assert hub_module.text_frame(text) == b"".join(connection.sent)

    asyncio.run(scenario())


def test_a_hundred_viewers_half_of_them_unresponsive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Responsive viewers get every step, the others are closed, and memory stays bounded."""
    monkeypatch.setattr(server_module, "SEND_TIMEOUT_S", 0.5)

    async def scenario() -> None:
        with EventLog(tmp_path) as log:
            begin(log)
            steps(log, 1, 2000)
            async with running(tmp_path) as server:
                unresponsive = [unresponsive_viewer(server) for _ in range(50)]
                async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
                    sockets = [await session.ws_connect(server.make_url("/ws"), max_msg_size=0) for _ in range(50)]
                    clients = [Client(viewer) for viewer in sockets]
                    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                    readers = [asyncio.create_task(client.until_step(2600)) for client in clients]
                    for first in range(2001, 2600, 50):
                        steps(log, first, first + 49)
                        await asyncio.sleep(0.05)
                    await asyncio.wait_for(asyncio.gather(*readers), 60)
                    curves = [client.curves["detection/loss"] for client in clients]
                    assert all(curve == curves[0] for curve in curves)
                    assert len(curves[0]) > 500 and curves[0][-1][0] == 2600
                    grown_bytes = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
                    assert grown_bytes < 150e6
                for each in unresponsive:
                    each.close()

    asyncio.run(scenario())


def unresponsive_viewer(server: TestServer) -> socket.socket:
    """Open a WebSocket and never read from it."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect((server.host, server.port))
    connection.sendall(
        f"GET /ws HTTP/1.1\r\nHost: {server.host}:{server.port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
    )
    return connection


def test_unresponsive_viewer_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "SEND_TIMEOUT_S", 0.2)

    async def scenario() -> None:
        with EventLog(tmp_path) as log:
            begin(log)
            for number in range(20):  # a snapshot larger than the socket buffers
                log.write("warning", message=f"{number}" + "x" * 400_000)
            async with running(tmp_path) as server:
                connection = unresponsive_viewer(server)
                app = server.app
                assert app is not None
                monitor = app[server_module.MONITOR]
                for condition in (lambda: len(monitor.sockets) == 1, lambda: len(monitor.sockets) == 0):
                    end_s = time.monotonic() + 30
                    while not condition():
                        assert time.monotonic() < end_s
                        await asyncio.sleep(0.02)
                assert monitor.hubs == {}
                connection.close()

    asyncio.run(scenario())


def test_message_from_a_client_closes_the_connection(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as server, viewing(server) as viewer:
            await viewer.send_str('{"stop": true}')
            while True:
                message = await viewer.receive(timeout=10)
                if message.type == aiohttp.WSMsgType.CLOSE:
                    assert message.data == aiohttp.WSCloseCode.POLICY_VIOLATION
                    return

    asyncio.run(scenario())


def test_missing_directory_and_port_in_use(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a directory"):
        serve(tmp_path / "nothing", "127.0.0.1", 0)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(UserError, match="choose another port with --port"):
            serve(tmp_path, "127.0.0.1", other.getsockname()[1])
