"""SIGKILL of one of two workers at random times: every run finishes, and nothing committed is lost."""

from __future__ import annotations

import os
import random
import signal
import statistics
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from pillsnap.observe.events import read_events
from pillsnap.runs.checkpoint import find_checkpoint
from pillsnap.runs.directory import open_run
from pillsnap.train.driver import train_run
from tests.reliability.harness import raw_events, say, tiny, train_workers, wait_for

KILLS_A_RUN = 5


class Killer(threading.Thread):
    """Kills a random worker at a random time after each start of the workers."""

    def __init__(self, run_dir: Path, kills: int, chance: random.Random) -> None:
        super().__init__(daemon=True)
        self.run_dir, self.kills, self.chance = run_dir, kills, chance
        self.times_s: list[float] = []
        self.done = threading.Event()

    def run(self) -> None:
        for number in range(1, self.kills + 1):
            while len([e for e in raw_events(self.run_dir, "task") if e["status"] == "started"]) < number:
                if self.done.wait(0.05):
                    return
            if self.done.wait(self.chance.uniform(0.0, 3.0)):
                return
            workers = train_workers()
            if workers:
                os.kill(self.chance.choice(workers).pid, signal.SIGKILL)
                self.times_s.append(time.time())


def recovery(events: list[dict[str, Any]], killed_s: float) -> tuple[float, bool]:
    """Seconds from a kill to the first new step, and whether training continued from the last committed checkpoint."""
    again = next(e for e in events if e["time"] > killed_s and e["kind"] == "task" and e["status"] == "started")
    first = next(e for e in events if e["time"] >= again["time"] and e["kind"] in ("step", "validation", "epoch"))
    committed = [e["step"] for e in events if e["kind"] == "checkpoint" and e["time"] < killed_s]
    return first["time"] - killed_s, again["step"] >= max(committed, default=0)


def kill_workers(
    tmp_path: Path, manifest: Path, root: Path, kills: int, epochs: int, seed: int
) -> tuple[list[tuple[float, bool]], float]:
    """Train until `kills` workers were killed; returns the recovery of each, and the seconds of the first run's start.

    The start runs from the call of `train_run` to the first "started" event.
    """
    recoveries: list[tuple[float, bool]] = []
    start_s: list[float] = []
    chance = random.Random(seed)
    for number in range(2 * kills):
        settings = tiny(
            train__task="classification", train__num_workers=2, train__max_failures=100,
            train__checkpoint_minutes=0.005,
            classification__epochs=epochs, classification__batch_size=16,
        )  # fmt: skip
        run, _ = open_run(tmp_path / f"run-{number}", settings, manifest, root)
        killer = Killer(run.run_dir, min(KILLS_A_RUN, kills - len(recoveries)), chance)
        killer.start()
        called_s = time.time()
        train_run(run)
        killer.done.set()
        killer.join()
        last, damaged = find_checkpoint(run.checkpoint_dir("classification"))
        assert last is not None and last.position.epoch == epochs and damaged == []
        events = read_events(run.run_dir)
        assert [e["epoch"] for e in events if e["kind"] == "epoch"] == list(range(1, epochs + 1))
        assert [e["epoch"] for e in events if e["kind"] == "validation"] == list(range(1, epochs + 1))
        steps = [e["step"] for e in events if e["kind"] == "step"]
        assert steps == list(range(1, last.position.global_step + 1))
        raw = raw_events(run.run_dir)
        end_s = raw[-1]["time"]
        starts = [e["time"] for e in raw if e["kind"] == "task" and e["status"] == "started"]
        start_s.append(starts[0] - called_s)
        recoveries += [recovery(raw, killed) for killed in killer.times_s if killed < end_s and max(starts) > killed]
        if len(recoveries) >= kills:
            break
    return recoveries, start_s[0]


@pytest.mark.usefixtures("ray_local")
def test_killed_workers_are_replaced(toy_manifest: Path, toy_tree: Path, tmp_path: Path) -> None:
    recoveries, start_s = kill_workers(tmp_path, toy_manifest, toy_tree, kills=2, epochs=20, seed=1)
    assert [kept for _, kept in recoveries] == [True, True]
    # The faster one, because a kill that hits the restart after another one lengthens that one's recovery. Measured by
    # the start of the same run, since machines differ by three times: 0.6 to 0.9 were seen.
    fastest_s = min(seconds for seconds, _ in recoveries)
    assert fastest_s <= 1.2 * start_s, (recoveries, start_s)


@pytest.mark.reliability
@pytest.mark.usefixtures("ray_local")
def test_twenty_killed_workers_are_replaced_within_30_s(toy_manifest: Path, toy_tree: Path, tmp_path: Path) -> None:
    recoveries, start_s = kill_workers(tmp_path, toy_manifest, toy_tree, kills=20, epochs=60, seed=20)
    times_s = [seconds for seconds, _ in recoveries]
    median_s, most_s = statistics.median(times_s), max(times_s)
    kept = sum(ok for _, ok in recoveries)
    recovery_s = f"recovery median {median_s:.1f} s, maximum {most_s:.1f} s, the run's own start {start_s:.1f} s"
    say(kept, 20, f"SIGKILL of one of two workers: {recovery_s}")
    assert median_s <= 15 and most_s <= 30


@pytest.mark.reliability
@pytest.mark.usefixtures("ray_local")
def test_paused_and_stuck_workers_are_detected(
    toy_manifest: Path, toy_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker stopped by SIGSTOP and one that sleeps in a step are both detected within 120 s."""
    import json

    from tests.reliability.harness import FAULTS_FILE, worker_with_faults

    monkeypatch.setattr("pillsnap.train.trainer.run_worker", worker_with_faults)
    found: list[float] = []
    replaced: list[float] = []
    for how in ("paused", "stuck"):
        settings = tiny(
            train__task="classification", train__num_workers=2, classification__epochs=6, classification__batch_size=16
        )
        run, _ = open_run(tmp_path / how, settings, toy_manifest, toy_tree)
        marker = run.run_dir / "hung"
        if how == "stuck":
            faults = {"hang_step": 5, "hang_rank": 1, "hang_once": str(marker)}
            (run.run_dir / FAULTS_FILE).write_text(json.dumps(faults))

        def pause(run_dir: Path = run.run_dir, marker: Path = marker) -> None:
            wait_for(lambda: [e for e in raw_events(run_dir, "step") if e["step"] >= 4], 120, "step")
            workers = train_workers()
            os.kill(max(worker.pid for worker in workers), signal.SIGSTOP)
            marker.write_text(str(time.time()))

        thread = threading.Thread(target=pause, daemon=True)
        if how == "paused":
            thread.start()
        train_run(run)
        assert [e["epoch"] for e in read_events(run.run_dir) if e["kind"] == "epoch"] == [1, 2, 3, 4, 5, 6]
        hung_s = float(marker.read_text())
        log = (run.run_dir / "train.log").read_text().splitlines()
        gave_up = [line for line in log if "this worker stops" in line]
        found.append(datetime.strptime(gave_up[0][:23], "%Y-%m-%d %H:%M:%S,%f").timestamp() - hung_s)
        starts = [e["time"] for e in raw_events(run.run_dir, "task") if e["status"] == "started" and e["time"] > hung_s]
        replaced.append(starts[0] - hung_s)
    say(
        sum(seconds <= 120 for seconds in found), 2,
        f"one of two workers paused, or stuck: found after {found[0]:.0f} and {found[1]:.0f} s, training again after "
        f"{replaced[0]:.0f} and {replaced[1]:.0f} s",
    )  # fmt: skip
