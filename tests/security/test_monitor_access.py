"""The web monitor sends nothing of a run to unauthorized clients."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp
import pytest
from aiohttp.test_utils import TestServer

from pillsnap.errors import UserError
from pillsnap.monitor.access import AccessRules, check_bind
from pillsnap.monitor.server import make_app, serve
from pillsnap.observe.events import EventLog

PATHS = ("/", "/ws", "/picture?run=run&task=detection", "/app.js")


async def statuses(
    server: TestServer, headers: dict[str, str], query: str = "", paths: tuple[str, ...] = PATHS
) -> list[tuple[int, str]]:
    """Status and body of each path, requested as a page or a WebSocket."""
    upgrade = {
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    }
    got = []
    async with aiohttp.ClientSession() as session:
        for path in paths:
            url = f"{server.make_url('/')}".rstrip("/") + path + query
            async with session.get(url, headers=headers | (upgrade if path == "/ws" else {})) as answer:
                body = "" if answer.status == 101 else await answer.text()
                got.append((answer.status, body))
    return got


def write_run(run_dir: Path) -> Path:
    with EventLog(run_dir) as log:
        log.write(
            "run", run_id="secret", name="secret", stage=1, config={}, manifest_hash="", num_workers=1, versions={}
        )
        log.write("examples", task="detection", epoch=1, path="../outside.png")
    (run_dir.parent / "outside.png").write_bytes(b"secret")
    return run_dir


@pytest.mark.parametrize(
    ("headers", "word"),
    [
        ({"Host": "evil.example"}, "Host"),
        ({"Host": "evil.example:8888"}, "Host"),
        ({"Host": "127.0.0.1.evil.example"}, "Host"),
        ({"Host": "192.168.0.7"}, "Host"),
        ({"Host": "[::1"}, "Host"),
        ({"Host": ""}, "Host"),
        ({"Origin": "http://evil.example"}, "Origin"),
        ({"Origin": "null"}, "Origin"),
        ({"Origin": "http://localhost:1"}, "Origin"),
        ({"Origin": "http://127.0.0.1@evil.example"}, "Origin"),
    ],
)
def test_wrong_host_or_origin_is_rejected(tmp_path: Path, headers: dict[str, str], word: str) -> None:
    async def scenario() -> None:
        async with TestServer(make_app(write_run(tmp_path / "run"))) as server:
            for status, body in await statuses(server, headers):
                assert (status, body) == (403, f"wrong {word}")

    asyncio.run(scenario())


def test_own_names_and_origin_are_accepted(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with TestServer(make_app(write_run(tmp_path / "run"))) as server:
            for name in ("127.0.0.1", "localhost", "[::1]", "LOCALHOST"):
                host = f"{name}:9999"  # like a tunnel
                for scheme in ("http", "https"):
                    headers = {"Host": host, "Origin": f"{scheme}://{host}"}
                    assert [s for s, _ in await statuses(server, headers, paths=("/", "/app.js"))] == [200, 200]

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("headers", "query", "may"),
    [
        ({}, "", False),
        ({}, "?token=wrong", False),
        ({"Authorization": "Bearer wrong"}, "?token=right", False),
        ({"Authorization": "Bearer "}, "", False),
        ({"Authorization": "Basic right"}, "", False),
        ({}, "?token=right", True),
        ({"Authorization": "Bearer right"}, "", True),
    ],
)
def test_token_by_header_or_query(tmp_path: Path, headers: dict[str, str], query: str, may: bool) -> None:
    async def scenario() -> None:
        async with TestServer(make_app(write_run(tmp_path / "run"), token="right")) as server:
            ((page, body),) = await statuses(server, headers, query, ("/",))
            assert page == (200 if may else 403) and ("PillSnap" in body) == may
            async with aiohttp.ClientSession() as session:
                try:
                    async with session.ws_connect(f"{server.make_url('/ws')}{query}", headers=headers) as viewer:
                        assert may and (await viewer.receive_json(timeout=10))["run"] == "run"
                except aiohttp.WSServerHandshakeError as error:
                    assert not may and error.status == 403

    asyncio.run(scenario())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "example.org", ""])
def test_public_address_without_a_token_is_rejected(tmp_path: Path, host: str) -> None:
    for token in (None, ""):
        with pytest.raises(UserError, match="token"):
            serve(tmp_path, host, 0, token)
    check_bind(host, "a token")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_loopback_needs_no_token(host: str) -> None:
    check_bind(host, None)


def test_public_address_accepts_ip_addresses_and_its_own_name() -> None:
    rules = AccessRules("0.0.0.0", "token")
    assert rules._is_own_host("192.168.0.7:8888") and rules._is_own_host("[fe80::1]:8888")
    assert not rules._is_own_host("evil.example:8888")
    assert AccessRules("gpu-box", "token")._is_own_host("GPU-box:8888")


def test_files_outside_the_run_and_writing_methods_are_rejected(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with TestServer(make_app(write_run(tmp_path / "run"))) as server, aiohttp.ClientSession() as session:
            base = f"{server.make_url('/')}".rstrip("/")
            async with session.ws_connect(f"{base}/ws") as viewer:
                assert (await viewer.receive_json(timeout=10))["type"] == "hello"
                for path in (
                    "/picture?run=run&task=detection",
                    "/../run/events.jsonl",
                    "/events.jsonl",
                    "/static/app.js",
                ):
                    async with session.get(base + path) as answer:
                        assert answer.status == 404 and b"secret" not in await answer.read()
            for method in ("POST", "PUT", "DELETE", "PATCH"):
                async with session.request(method, f"{base}/") as answer:
                    assert answer.status == 405

    asyncio.run(scenario())


def test_page_loads_nothing_from_other_hosts() -> None:
    static = Path(make_app.__code__.co_filename).parent / "static"
    for path in static.iterdir():
        text = path.read_text(encoding="utf-8")
        assert "://" not in text.replace("http://www.w3.org", ""), path
        assert not any(
            word in text for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(")
        ), path

    async def scenario(run_dir: Path) -> None:
        async with TestServer(make_app(run_dir)) as server, aiohttp.ClientSession() as session:
            async with session.get(server.make_url("/")) as answer:
                policy = answer.headers["Content-Security-Policy"]
            assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
            assert "unsafe" not in policy and "*" not in policy

    asyncio.run(scenario(static))


PUBLIC = "https://pills.example/monitor/"


@pytest.mark.parametrize(
    ("headers", "query", "may"),
    [
        ({"Host": "pills.example", "Origin": "https://pills.example"}, "?token=right", True),  # Host passed on
        ({"Host": "127.0.0.1:8888", "Origin": "https://pills.example"}, "?token=right", True),  # Host rewritten
        ({"Host": "pills.example"}, "", False),
        ({"Host": "pills.example", "Origin": "https://evil.example"}, "?token=right", False),
        ({"Host": "127.0.0.1:8888", "Origin": "https://pills.example.evil"}, "?token=right", False),
        ({"Host": "127.0.0.1:8888", "Origin": "http://pills.example"}, "?token=right", False),
        ({"Host": "evil.example"}, "?token=right", False),
    ],
)
def test_monitor_behind_a_reverse_proxy(tmp_path: Path, headers: dict[str, str], query: str, may: bool) -> None:
    async def scenario() -> None:
        app = make_app(write_run(tmp_path / "run"), token="right", public_url=PUBLIC)
        async with TestServer(app) as server, aiohttp.ClientSession() as session:
            found = [status for status, _ in await statuses(server, headers, query, paths=("/", "/ws"))]
            assert found == ([200, 101] if may else [403, 403])
            async with session.get(server.make_url("/" + query), headers=headers) as answer:
                policy = answer.headers["Content-Security-Policy"]
            assert "connect-src 'self' ws://pills.example wss://pills.example;" in policy

    asyncio.run(scenario())


@pytest.mark.parametrize("url", ["pills.example", "ftp://pills.example", "https://", "https://a:b@pills.example"])
def test_public_url_is_an_address_and_needs_a_token(url: str) -> None:
    with pytest.raises(UserError, match="--public-url"):
        check_bind("127.0.0.1", "token", url)
    with pytest.raises(UserError, match="token"):
        check_bind("127.0.0.1", "", PUBLIC)
    check_bind("127.0.0.1", "token", PUBLIC)
