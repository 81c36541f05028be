"""SIGKILL of driver, raylet, GCS, worker or all at random times, and the same command again: the end is that of the
uninterrupted run, bit for bit, and no process is left.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from pillsnap.observe.events import read_events
from pillsnap.runs.checkpoint import find_checkpoint
from tests.processes import command_line, descendants, is_running, titled
from tests.reliability.harness import FAULTS_FILE, same_state, say, wait_for
from tests.reliability.test_driver_dies import Driver

PARTS = ("driver", "raylet", "gcs_server", "worker", "tree")
GONE_WITHIN_S = 20.0


def settings(epochs: int) -> dict[str, object]:
    return {
        "train__task": "classification", "classification__epochs": epochs, "train__checkpoint_minutes": 0.005,
        "wandb__mode": "offline",
    }  # fmt: skip


def driver_of(run_dir: Path, manifest: Path, root: Path, epochs: int) -> Driver:
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / FAULTS_FILE).write_text('{"threads": 1, "step_pause_s": 0.05}')
    return Driver(run_dir, manifest, root, settings(epochs))


def kill(driver: Driver, part: str) -> list[psutil.Process]:
    """SIGKILL of a part of the run, once it is there; of all processes for `tree`. Returns those that have to end."""
    if part in ("driver", "tree"):
        processes = descendants(driver.process.pid)
        for process in processes if part == "tree" else []:
            process.kill()
        driver.kill()
        return processes
    title = "TrainWorker" if part == "worker" else f"/{part}"
    victim = wait_for(lambda: titled(title, driver.process.pid), 60, part)[0]
    processes = [victim, *descendants(victim.pid)] if part == "worker" else descendants(driver.process.pid)
    victim.kill()
    return processes


def kill_parts(run_dir: Path, manifest: Path, root: Path, parts: Sequence[str], epochs: int, seed: int) -> list[str]:
    """Run a training with these kills to its end; returns what was wrong after a kill."""
    chance, wrong = random.Random(seed), []
    for number, part in enumerate(parts):
        driver = driver_of(run_dir, manifest, root, epochs)
        if part == "worker" or chance.random() < 0.6:
            driver.await_event(kind="task", status="started")
            time.sleep(chance.uniform(0.0, 3.0))
        else:
            time.sleep(chance.uniform(0.0, 9.0))  # while Ray starts
        assert driver.process.poll() is None, f"the run ended before kill {number}"
        killed_s = time.time()
        processes = kill(driver, part)
        if part in ("raylet", "gcs_server"):
            code, line = driver.finish(), driver.errors.splitlines()[-1]
            if code != 2 or not ("head process has ended" in line or "Ray did not start" in line):
                wrong.append(f"{number} {part}: exit {code}, {line}")
            if "Ray did not start" not in line and time.time() > killed_s + GONE_WITHIN_S:
                wrong.append(f"{number} {part}: noticed after {time.time() - killed_s:.0f} s")
        elif part == "worker":  # the run goes on
            driver.started_s = killed_s
            driver.await_event(kind="task", status="started")
            driver.kill()
        while (left := [p for p in processes if is_running(p.pid) and p.is_running()]) and (
            time.time() < killed_s + GONE_WITHIN_S
        ):
            time.sleep(0.1)
        wrong += [f"{number} {part}: left {command_line(process)[:3]}" for process in left]
    driver = driver_of(run_dir, manifest, root, epochs)
    assert driver.finish() == 0, driver.errors
    return wrong


def check(tmp_path: Path, manifest: Path, root: Path, parts: Sequence[str], epochs: int, seed: int) -> list[str]:
    wrong = kill_parts(tmp_path / "killed", manifest, root, parts, epochs, seed)
    whole = driver_of(tmp_path / "whole", manifest, root, epochs)
    assert whole.finish() == 0, whole.errors
    ends = [find_checkpoint(tmp_path / name / "checkpoints" / "classification")[0] for name in ("killed", "whole")]
    assert same_state(*ends) == []
    losses = [
        [(e["step"], e["loss"]) for e in read_events(tmp_path / name) if e["kind"] == "step"]
        for name in ("killed", "whole")
    ]
    assert losses[0] == losses[1]
    return wrong


@pytest.mark.reliability
def test_killed_parts_leave_nothing_and_change_nothing(toy_manifest: Path, toy_tree: Path, tmp_path: Path) -> None:
    assert check(tmp_path, toy_manifest, toy_tree, ("raylet", "driver", "gcs_server"), epochs=30, seed=3) == []


@pytest.mark.reliability
def test_thirty_killed_parts_leave_nothing_and_change_nothing(
    toy_manifest: Path, toy_tree: Path, tmp_path: Path
) -> None:
    parts = [part for part in PARTS for _ in range(6)]
    random.Random(30).shuffle(parts)
    wrong = check(tmp_path, toy_manifest, toy_tree, parts, epochs=300, seed=30)
    say(30 - len(wrong), 30, f"SIGKILL of driver, raylet, GCS, worker or all: same end, nothing left {wrong or ''}")
