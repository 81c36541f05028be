"""What does watching cost a training?

    python -m benchmarks.watching [--quick] [--json FILE] [--folder DIR]

One training of the demo's detector on this machine, all the while with a terminal monitor, a web monitor with 100
WebSocket clients of which half never read, and the Weights & Biases mirror, whose server answers 401 from the first
quarter on and is gone from the third (a second mirror meets that). Watchers run and are stopped (SIGSTOP) by turns, in
the order run, stop, stop, run: neighbours are a pair, and the control is the same training seconds before or after.
Throughput is steps in a window over the time between them; steps across the end of an epoch are left out.

At the end all watchers are killed (SIGKILL) and the training must go on. Then the same training runs once more with
nobody watching, and its losses must be the same numbers.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import pty
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from pillsnap.observe.events import EventFollower, read_events
from pillsnap.observe.wandb_mirror import WandbMirror
from tests.unit.observe.conftest import WandbServer

NUM_CLIENTS = 100
SETTLE_S = 1.0  # after watchers are stopped or go on: what they missed is not what watching costs
LIMIT, LIMIT_RSS_BYTES = 0.01, 200e6


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="4 short pairs instead of 24")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--folder", type=Path, help="folder for photos and runs [default: a temporary one]")
    parser.add_argument("--clients", help=argparse.SUPPRESS)  # this program as the clients, of this address
    options = parser.parse_args()
    if options.clients:
        asyncio.run(run_clients(options.clients))
        return
    pairs, window_s = (4, 6.0) if options.quick else (24, 9.0)
    with tempfile.TemporaryDirectory() as temporary:
        figures = measure(options.folder or Path(temporary), pairs, window_s)
    print_figures(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2), encoding="utf-8")


def measure(folder: Path, pairs: int, window_s: float) -> dict[str, Any]:
    """Train, watched by turns; kill the watchers; train again unwatched."""
    prepare(folder)
    with contextlib.ExitStack() as ended:
        return _measure(folder, pairs, window_s, ended)


def _measure(folder: Path, pairs: int, window_s: float, ended: contextlib.ExitStack) -> dict[str, Any]:
    watched = Training(folder, "watched")
    ended.callback(watched.stop)
    log = StepLog(watched.run_dir)
    log.wait_for_steps(60, watched)  # everything is warm
    server = WandbServer()
    # Its second-long batches would hide a failure until the run is over.
    os.environ.update(WANDB_BASE_URL=server.url, WANDB_API_KEY="k" * 40, WANDB__FILE_STREAM_TRANSMIT_INTERVAL="2")
    warnings: list[str] = []
    watchers = Watchers(watched.run_dir, warnings)
    ended.callback(watchers.kill)
    windows: list[Window] = []
    for number in range(pairs):
        if number == pairs // 4:
            server.refuse_uploads = True
        if number == pairs // 2:
            watchers.restart_mirror()
            server.refuse_uploads = False
        if number == 3 * pairs // 4:
            server.server.shutdown()
            server.server.server_close()
        for running in (True, False) if number % 2 == 0 else (False, True):
            windows.append(watchers.window(running, window_s))
    rss_bytes = watchers.max_server_rss_bytes
    watchers.kill()
    before_kill = log.poll()
    log.wait_for_steps(before_kill + 20, watched)
    watched.stop()
    events = read_events(watched.run_dir)
    disturbed = [event["message"] for event in events if event["kind"] in ("warning", "failure")]
    alone = Training(folder, "alone")
    ended.callback(alone.stop)
    num_compared = min(120, log.poll())
    StepLog(alone.run_dir).wait_for_steps(num_compared, alone)
    alone.stop()
    losses = [[event["loss"] for event in read_events(t.run_dir) if event["kind"] == "step"] for t in (watched, alone)]
    speeds = [log.steps_per_s(window) for window in windows]
    ratios = [paired(windows[i : i + 2], speeds[i : i + 2]) for i in range(0, len(windows), 2)]
    running_s = sum(window.end - window.start for window in windows if window.running)
    return {
        "watched_images_per_s": 16 * statistics.median(s for s, w in zip(speeds, windows, strict=True) if w.running),
        "unwatched_images_per_s": 16
        * statistics.median(s for s, w in zip(speeds, windows, strict=True) if not w.running),
        "ratios": ratios,
        "ratio": statistics.median(ratios),
        "ratio_quartiles": statistics.quantiles(ratios, n=4)[::2],
        "cpu_cores": os.cpu_count(),
        "cpu_s_per_s": {name: seconds / running_s for name, seconds in watchers.cpu_s.items()},
        "server_rss_bytes": rss_bytes,
        "mirror_warnings": warnings,
        "disturbances": disturbed,
        "steps_after_kill": log.poll() - before_kill,
        "losses_compared": num_compared,
        "losses_equal": losses[0][:num_compared] == losses[1][:num_compared],
    }


def paired(windows: list[Window], speeds: list[float]) -> float:
    """Watched over unwatched throughput of two neighbouring windows."""
    by_kind = {window.running: speed for window, speed in zip(windows, speeds, strict=True)}
    return by_kind[True] / by_kind[False]


def prepare(folder: Path) -> None:
    """Photos and a manifest."""
    from pillsnap.data.build import build_manifest
    from pillsnap.data.synthetic import generate

    if not (folder / "manifest.parquet").exists():
        generate(folder / "photos", num_classes=8, num_singles=600, num_combinations=200, frame=(488, 640))
        build_manifest(folder / "photos", folder, num_photos=None, num_classes=None, val_fraction=0.1, seed=42)


class Training:
    """`pillsnap train` of the detector in a process of its own."""

    def __init__(self, folder: Path, name: str) -> None:
        self.run_dir = folder / name
        settings = (
            "detection.epochs=1000",
            "detection.image_size_px=128",
            "train.log_every_steps=1",
            "wandb.mode=disabled",
            "train.amp=off",
        )
        arguments = ["--preset", "demo", "--task", "detection", "--data-root", folder / "photos"]
        arguments += ["--manifest", folder, "--run", self.run_dir]
        for setting in settings:
            arguments += ["--set", setting]
        command = [sys.executable, "-m", "pillsnap.cli", "train", *map(str, arguments)]
        self.run_dir.mkdir(parents=True)
        with (self.run_dir / "console.log").open("wb") as console:
            self.process = subprocess.Popen(command, stdout=console, stderr=console)

    def stop(self) -> None:
        """A checkpoint, and an end."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(180) == 130, (self.run_dir / "console.log").read_text()[-2000:]


class Window:
    """A span of unix time in which the watchers ran, or did not."""

    def __init__(self, running: bool, start: float, end: float) -> None:
        self.running, self.start, self.end = running, start, end


class StepLog:
    """Times of a training's steps."""

    def __init__(self, run_dir: Path) -> None:
        self.follower = EventFollower(run_dir)
        self.steps: list[tuple[float, int]] = []  # unix time, epoch

    def poll(self) -> int:
        """How many steps there are by now."""
        self.steps += [(event["time"], event["epoch"]) for event in self.follower.poll() if event["kind"] == "step"]
        return len(self.steps)

    def wait_for_steps(self, count: int, training: Training) -> None:
        end_s = time.monotonic() + 900
        while self.poll() < count:
            assert training.process.poll() is None, (training.run_dir / "console.log").read_text()[-2000:]
            assert time.monotonic() < end_s, f"only {len(self.steps)} steps"
            time.sleep(0.2)

    def steps_per_s(self, window: Window) -> float:
        """Over the intervals between a window's steps that belong to one epoch."""
        self.poll()
        inside = [step for step in self.steps if window.start <= step[0] <= window.end]
        intervals = [after[0] - before[0] for before, after in pairwise(inside) if before[1] == after[1]]
        return len(intervals) / sum(intervals)


class Watchers:
    """Terminal monitor, web monitor with its clients, mirror: each the leader of a process group."""

    def __init__(self, run_dir: Path, warnings: list[str]) -> None:
        self.run_dir, self.warnings = run_dir, warnings
        self.port = free_port()
        self.cpu_s = dict.fromkeys(("server", "terminal", "mirror", "clients"), 0.0)
        self.max_server_rss_bytes = 0
        self.mirror = self._start_mirror()
        monitor = ["-m", "pillsnap.cli", "monitor", "--run", str(run_dir)]
        self.processes = {
            "server": subprocess.Popen(
                [sys.executable, "-m", "pillsnap.monitor.daemon", str(run_dir), "127.0.0.1", str(self.port)],
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            ),
            "terminal": start_in_terminal([sys.executable, *monitor]),
        }
        wait_for_port(self.port)
        url = f"ws://127.0.0.1:{self.port}/ws"
        self.processes["clients"] = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.watching", "--clients", url], start_new_session=True
        )
        time.sleep(8)  # all are connected, and W&B has begun

    def window(self, running: bool, seconds: float) -> Window:
        """Let the watchers run, or stop them, for so long."""
        self._signal(signal.SIGCONT if running else signal.SIGSTOP)
        time.sleep(SETTLE_S)
        before, start = self._cpu_s(), time.time()
        time.sleep(seconds)
        end = time.time()
        if running:
            for name, seconds_used in self._cpu_s().items():
                self.cpu_s[name] += max(0.0, seconds_used - before.get(name, 0.0))
            rss = psutil.Process(self.processes["server"].pid).memory_info().rss
            self.max_server_rss_bytes = max(self.max_server_rss_bytes, rss)
        return Window(running, start, end)

    def restart_mirror(self) -> None:
        self._signal(signal.SIGCONT)
        self.mirror.close(timeout_s=20)
        self.mirror = self._start_mirror()
        time.sleep(8)

    def kill(self) -> None:
        """SIGKILL, to all of them at once."""
        self._signal(signal.SIGKILL)
        for process in self.processes.values():
            process.wait()
        self.mirror.close(timeout_s=5)

    def _start_mirror(self) -> WandbMirror:
        mirror = WandbMirror(self.run_dir, "bench", mode="online", on_warning=self.warnings.append, say=lambda _: None)
        return mirror.start()

    def _groups(self) -> dict[str, int]:
        groups = {name: process.pid for name, process in self.processes.items()}
        mirror = self.mirror._process
        return groups | ({"mirror": mirror.pid} if mirror is not None else {})

    def _signal(self, signum: signal.Signals) -> None:
        for group in self._groups().values():
            with contextlib.suppress(ProcessLookupError):  # the mirror ends when W&B fails
                os.killpg(group, signum)

    def _cpu_s(self) -> dict[str, float]:
        found = {}
        for name, pid in self._groups().items():
            with contextlib.suppress(psutil.NoSuchProcess):
                leader = psutil.Process(pid)
                times = [each.cpu_times() for each in (leader, *leader.children(recursive=True))]
                found[name] = sum(each.user + each.system for each in times)
        return found


def start_in_terminal(command: list[str]) -> subprocess.Popen[bytes]:
    """Start a program on a terminal of 140 x 45 that somebody reads."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "140", "LINES": "45"}
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
    )
    os.close(theirs)

    def read() -> None:
        with contextlib.suppress(OSError):
            while os.read(ours, 1 << 16):
                pass

    threading.Thread(target=read, daemon=True).start()
    return process


async def run_clients(url: str) -> None:
    """Half read and answer pings, half open a connection and leave it; all come back when they are cut off."""
    import aiohttp

    os.nice(19)  # they stand for other machines
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        readers = [reader(session, url) for _ in range(NUM_CLIENTS // 2)]
        await asyncio.gather(*readers, *(deaf(url) for _ in range(NUM_CLIENTS // 2)))


async def reader(session: Any, url: str) -> None:
    import aiohttp

    while True:
        with contextlib.suppress(aiohttp.ClientError):
            async with session.ws_connect(url, max_msg_size=0) as connection:
                async for _ in connection:
                    pass
        await asyncio.sleep(1)


async def deaf(url: str) -> None:
    """Never reads; notices only that the other side has cut the connection."""
    host, _, port = url.removeprefix("ws://").removesuffix("/ws").partition(":")
    while True:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with contextlib.suppress(OSError):
            connection.connect((host, int(port)))
            connection.sendall(
                f"GET /ws HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
            )
            while connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) == b"\x01":  # established
                await asyncio.sleep(1)
        connection.close()
        await asyncio.sleep(1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for_port(port: int) -> None:
    end_s = time.monotonic() + 60
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        assert time.monotonic() < end_s, "the web monitor does not listen"
        time.sleep(0.1)


def print_figures(figures: dict[str, Any]) -> None:
    low, high = figures["ratio_quartiles"]
    print(f"unwatched (control)  {figures['unwatched_images_per_s']:.2f} img/s, median of {len(figures['ratios'])}")
    print(f"watched              {figures['watched_images_per_s']:.2f} img/s")
    print(f"ratio                {figures['ratio']:.4f}, median of pairs (quartiles {low:.4f}, {high:.4f}); limit 0.99")
    for name, share in figures["cpu_s_per_s"].items():
        print(f"{name:20} {1000 * share:.1f} ms of processor time a second, of {1000 * figures['cpu_cores']}")
    print(f"web monitor's memory {figures['server_rss_bytes'] / 1e6:.0f} MB (limit 200)")
    for warning in figures["mirror_warnings"]:
        print(f"mirror               {warning[:160]}")
    print(f"after SIGKILL        {figures['steps_after_kill']} more steps; warnings: {figures['disturbances']}")
    same = "the same" if figures["losses_equal"] else "NOT the same"
    print(f"losses               {same} as unwatched, {figures['losses_compared']} steps")


if __name__ == "__main__":
    main()
