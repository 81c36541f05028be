"""What do monitors and the W&B mirror cost a training?

    python -m benchmarks.watching [--quick] [--pairs N] [--cost] [--json FILE]

The training is the package's own loop in a separate process: a classifier on one fixed batch, on all processor cores,
so that no wait for data hides the cost. It logs at the default interval (`train.log_every_steps`); its steps take 50
ms, which gives two events per second. The observers are a terminal monitor, a web monitor with 100 WebSocket clients
(half of them never read), and the Weights & Biases mirror, whose server answers 401 after the first quarter; a second
mirror follows, whose server disappears after the third quarter. Observers alternately run and are stopped (SIGSTOP),
in the order run, stop, stop, run: neighbouring windows are a pair, and the control is the same training before or
after. Beside the throughput, which depends on other work on the machine, the processor time of each observer and of
the training per step is printed.

With --cost there is no training: five steps per second are written to a log, and only the observers' processor time and
memory are measured.

At the end all observers are killed (SIGKILL) and the training must continue. Then the same training runs again without
observers, and its losses must be equal.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.watchers.training import BATCH, StepLog, Training, Window
from benchmarks.watchers.viewers import free_port, run_clients, start_in_terminal, wait_for_port
from pillsnap.observe.events import EventLog, read_events
from pillsnap.tracking.mirror import WandbMirror
from tests.unit.tracking.conftest import WandbServer

# Minimum number of steps per window; a slow machine has longer windows.
STEPS_IN_WINDOW = 100
SETTLE_S = 6.0  # after observers are stopped or continued: all poll within 5 s and catch up


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="4 short pairs")
    parser.add_argument("--pairs", type=int, default=20, help="number of window pairs, each half a minute or more")
    parser.add_argument("--cost", action="store_true", help="measure the observers only, without a training")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--clients", help=argparse.SUPPRESS)  # runs the clients of this address
    options = parser.parse_args()
    if options.clients:
        asyncio.run(run_clients(options.clients))
        return
    # SIGTERM must also end the child processes.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    if options.cost:
        with tempfile.TemporaryDirectory() as temporary:
            cost = measure_cost(Path(temporary), 10.0 if options.quick else 60.0)
        print_cost(cost)
        if options.json:
            options.json.write_text(json.dumps(cost, indent=2), encoding="utf-8")
        return
    pairs, window_s = (4, 6.0) if options.quick else (options.pairs, 9.0)
    with tempfile.TemporaryDirectory() as temporary:
        figures = measure(Path(temporary), pairs, window_s)
    print_figures(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2), encoding="utf-8")


def measure_cost(run_dir: Path, seconds: float) -> dict[str, Any]:
    """Cost of the observers of a log with five steps per second."""
    ended = threading.Event()
    at = {"task": "detection", "epoch": 1}
    figures = {"loss": 1.5, "losses": {"box": 1.0, "cls": 0.3, "dfl": 0.2}, "lr": 1e-3, "images_per_s": 80.0}

    def write() -> None:
        with EventLog(run_dir) as log:
            facts: dict[str, Any] = {
                "stage": None,
                "config": {},
                "manifest_hash": "h",
                "num_workers": 1,
                "versions": {},
            }
            log.write("run", run_id="cost", name="cost", **facts)
            log.write("task", task="detection", status="started", epochs=10, steps_per_epoch=1000)
            step = 0
            while not ended.wait(0.2):
                step += 1
                log.write("step", step=step, data_wait_fraction=0.1, eta_s=100.0, **at, **figures)

    writer = threading.Thread(target=write)
    writer.start()
    server = WandbServer()
    os.environ.update(WANDB_BASE_URL=server.url, WANDB_API_KEY="k" * 40, WANDB__FILE_STREAM_TRANSMIT_INTERVAL="2")
    with contextlib.ExitStack() as stack:
        stack.callback(writer.join)
        stack.callback(ended.set)
        watchers = Watchers(run_dir, psutil.Process(), [], server)
        stack.callback(watchers.kill)
        watchers.window(True, seconds)
        viewers = psutil.Process(watchers.processes["server"].pid).net_connections("tcp")
        return {
            "cpu_cores": os.cpu_count(),
            "load_average": os.getloadavg()[0],
            "num_viewers": sum(viewer.status == psutil.CONN_ESTABLISHED for viewer in viewers),
            "cpu_s_per_s": {name: used / seconds for name, used in watchers.cpu_s.items()},
            "mirror_start_cpu_s": max(watchers.mirror_starts_cpu_s),
            "server_rss_bytes": watchers.max_server_rss_bytes,
        }


def measure(folder: Path, pairs: int, window_s: float) -> dict[str, Any]:
    """Train with alternating observers; kill them; train again without."""
    with contextlib.ExitStack() as ended:
        return _measure(folder, pairs, window_s, ended)


def _measure(folder: Path, pairs: int, window_s: float, ended: contextlib.ExitStack) -> dict[str, Any]:
    watched = Training(folder, "watched")
    ended.callback(watched.stop)
    log = StepLog(watched.run_dir)
    log.wait_for_step(60, watched)  # warmed up
    warm_s = time.monotonic()
    log.wait_for_step(120, watched)
    window_s = max(window_s, STEPS_IN_WINDOW * (time.monotonic() - warm_s) / 60)
    server = WandbServer()
    # The default interval of 15 s would hide failures until the end of the run.
    os.environ.update(WANDB_BASE_URL=server.url, WANDB_API_KEY="k" * 40, WANDB__FILE_STREAM_TRANSMIT_INTERVAL="2")
    warnings: list[str] = []
    watchers = Watchers(watched.run_dir, psutil.Process(watched.process.pid), warnings, server)
    ended.callback(watchers.kill)
    windows: list[Window] = []
    for number in range(pairs):
        if number == pairs // 4:
            server.refuse_uploads = True
        if number == pairs // 2:
            server.refuse_uploads = False
            watchers.restart_mirror()
        if number == 3 * pairs // 4:
            server.server.shutdown()
            server.server.server_close()
        for running in (True, False) if number % 2 == 0 else (False, True):
            windows.append(watchers.window(running, window_s))
    rss_bytes = watchers.max_server_rss_bytes
    watchers.kill()
    before_kill = log.poll()
    log.wait_for_step(before_kill + 20, watched)
    watched.stop()
    events = read_events(watched.run_dir)
    disturbed = [event["message"] for event in events if event["kind"] in ("warning", "failure")]
    alone = Training(folder, "alone")
    ended.callback(alone.stop)
    num_compared = min(120, log.poll())  # steps
    StepLog(alone.run_dir).wait_for_step(num_compared, alone)
    alone.stop()
    losses = [
        {event["step"]: event["loss"] for event in read_events(training.run_dir) if event["kind"] == "step"}
        for training in (watched, alone)
    ]
    compared = [step for step in losses[0] if step <= num_compared]
    speeds = [log.steps_per_s(window) for window in windows]
    ratios = [paired(windows[i : i + 2], speeds[i : i + 2]) for i in range(0, len(windows), 2)]
    costs = [speed * (window.end - window.start) / window.cpu_s for speed, window in zip(speeds, windows, strict=True)]
    cpu_ratios = [paired(windows[i : i + 2], costs[i : i + 2]) for i in range(0, len(windows), 2)]
    ratios, cpu_ratios = ([ratio for ratio in found if not math.isnan(ratio)] for found in (ratios, cpu_ratios))
    running_s = sum(window.end - window.start for window in windows if window.running)
    return {
        "watched_images_per_s": BATCH
        * statistics.median(s for s, w in zip(speeds, windows, strict=True) if w.running and s == s),
        "unwatched_images_per_s": BATCH
        * statistics.median(s for s, w in zip(speeds, windows, strict=True) if not w.running and s == s),
        "cpu_s_per_step_ratio": statistics.median(cpu_ratios),
        "load_average": os.getloadavg()[0],
        "ratios": ratios,
        "ratio": statistics.median(ratios),
        "ratio_quartiles": statistics.quantiles(ratios, n=4)[::2],
        "cpu_cores": os.cpu_count(),
        "cpu_s_per_s": {name: seconds / running_s for name, seconds in watchers.cpu_s.items()},
        "mirror_start_cpu_s": max(watchers.mirror_starts_cpu_s),
        "server_rss_bytes": rss_bytes,
        "mirror_warnings": warnings,
        "disturbances": disturbed,
        "steps_after_kill": log.poll() - before_kill,
        "losses_compared": len(compared),
        "losses_equal": bool(compared) and all(losses[0][step] == losses[1].get(step) for step in compared),
    }


def paired(windows: list[Window], speeds: list[float]) -> float:
    """Throughput with observers over throughput without, of two neighbouring windows."""
    return speeds[not windows[0].running] / speeds[windows[0].running]


class Watchers:
    """Terminal monitor, web monitor with its clients, mirror."""

    def __init__(self, run_dir: Path, training: psutil.Process, warnings: list[str], server: WandbServer) -> None:
        self.run_dir, self.training, self.warnings, self.wandb_server = run_dir, training, warnings, server
        self.port = free_port()
        self.cpu_s = dict.fromkeys(("server", "terminal", "mirror", "clients"), 0.0)
        self.max_server_rss_bytes, self.mirror_starts_cpu_s = 0, list[float]()
        self.mirror = self._start_mirror()
        monitor = ["-m", "pillsnap.cli", "monitor", "--run", str(run_dir)]
        self.processes = {
            "server": subprocess.Popen(
                [sys.executable, "-m", "pillsnap.monitor.daemon", str(run_dir), "127.0.0.1", str(self.port), ""],
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
        self._wait_for_mirror()
        time.sleep(5)  # all are connected

    def window(self, running: bool, seconds: float) -> Window:
        """Let the observers run, or stop them, for this time."""
        self._signal(signal.SIGCONT if running else signal.SIGSTOP)
        time.sleep(SETTLE_S)
        before, start, times = self._cpu_s(), time.time(), self.training.cpu_times()
        time.sleep(seconds)
        end, times_after = time.time(), self.training.cpu_times()
        if running:
            for name, seconds_used in self._cpu_s().items():
                self.cpu_s[name] += max(0.0, seconds_used - before.get(name, 0.0))
            rss = psutil.Process(self.processes["server"].pid).memory_info().rss
            self.max_server_rss_bytes = max(self.max_server_rss_bytes, rss)
        return Window(running, start, end, times_after.user + times_after.system - times.user - times.system)

    def restart_mirror(self) -> None:
        self._signal(signal.SIGCONT)
        self.mirror.close(timeout_s=20)
        self.mirror = self._start_mirror()
        self._wait_for_mirror()

    def kill(self) -> None:
        """SIGKILL all of them."""
        self._signal(signal.SIGKILL)
        for process in self.processes.values():
            process.wait()
        self.mirror.close(timeout_s=5)

    def _start_mirror(self) -> WandbMirror:
        mirror = WandbMirror(self.run_dir, "bench", mode="online", on_warning=self.warnings.append, say=lambda _: None)
        return mirror.start()

    def _wait_for_mirror(self) -> None:
        """Wait until it has sent something: the cost of its start occurs once per task and is printed separately."""
        before, end_s = self._num_rows(), time.monotonic() + 180
        while self._num_rows() == before:
            assert time.monotonic() < end_s, f"nothing was mirrored: {self.warnings}"
            time.sleep(0.2)
        self.mirror_starts_cpu_s.append(self._cpu_s()["mirror"])

    def _num_rows(self) -> int:
        return sum(len(rows) for rows in self.wandb_server.rows.values())

    def _members(self) -> dict[str, list[psutil.Process]]:
        """Each observer's process and its descendants; the service of W&B has its own session."""
        leaders = {name: process.pid for name, process in self.processes.items()}
        mirror = self.mirror._process
        found = {}
        for name, pid in (leaders | ({"mirror": mirror.pid} if mirror is not None else {})).items():
            with contextlib.suppress(psutil.NoSuchProcess):  # the mirror ends when W&B fails
                leader = psutil.Process(pid)
                found[name] = [leader, *leader.children(recursive=True)]
        return found

    def _signal(self, signum: signal.Signals) -> None:
        for members in self._members().values():
            for member in members:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.send_signal(signum)

    def _cpu_s(self) -> dict[str, float]:
        found = {}
        for name, members in self._members().items():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = [member.cpu_times() for member in members]
                found[name] = sum(each.user + each.system for each in times)
        return found


def print_figures(figures: dict[str, Any]) -> None:
    low, high = figures["ratio_quartiles"]
    print(f"unwatched (control)  {figures['unwatched_images_per_s']:.2f} img/s, median of {len(figures['ratios'])}")
    print(f"watched              {figures['watched_images_per_s']:.2f} img/s")
    print(f"ratio                {figures['ratio']:.4f}, median of pairs (quartiles {low:.4f}, {high:.4f}); limit 0.99")
    print(f"steps a CPU second   {figures['cpu_s_per_step_ratio']:.4f} of the control's")
    print_cost(figures)
    for warning in figures["mirror_warnings"]:
        print(f"mirror               {warning[:160]}")
    print(f"after SIGKILL        {figures['steps_after_kill']} more steps; warnings: {figures['disturbances']}")
    same = "the same" if figures["losses_equal"] else "NOT the same"
    print(f"losses               {same} as unwatched, {figures['losses_compared']} of them")


def print_cost(figures: dict[str, Any]) -> None:
    print(f"load average         {figures['load_average']:.1f} on {figures['cpu_cores']} cores")
    for name, share in figures["cpu_s_per_s"].items():
        print(f"{name:20} {1000 * share:.1f} ms of processor time a second, of {1000 * figures['cpu_cores']}")
    print(f"mirror's start       {figures['mirror_start_cpu_s']:.1f} s of processor time, once per task")
    print(f"web monitor's memory {figures['server_rss_bytes'] / 1e6:.0f} MB (limit 200)")


if __name__ == "__main__":
    main()
