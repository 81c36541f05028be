"""The driver is killed or stopped; the same command continues from the last checkpoint."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from pillsnap.observe.events import read_events
from pillsnap.runs.checkpoint import find_checkpoint
from tests.conftest import ROOT
from tests.processes import is_running
from tests.reliability.harness import raw_events, say, wait_for

START_TIMEOUT_S = 240
FINISH_TIMEOUT_S = 600
"""On a busy machine the mirror to Weights & Biases, which has the lowest priority, may take 320 s at the end."""


class Driver:
    """The command, in its own process group."""

    def __init__(self, run_dir: Path, manifest: Path, root: Path, overrides: dict[str, Any]) -> None:
        self.run_dir = run_dir
        command = [sys.executable, "-m", "tests.reliability.driver", str(run_dir), str(manifest), str(root)]
        self.started_s = time.time()
        self.process = subprocess.Popen(
            [*command, json.dumps(overrides)], cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE, text=True
        )

    def await_event(self, **wanted: Any) -> dict[str, Any]:
        """The first new event with these fields."""

        def found() -> dict[str, Any] | None:
            assert self.process.poll() is None, self.process.communicate()
            new = (e for e in raw_events(self.run_dir) if e["time"] >= self.started_s)
            return next((e for e in new if all(e.get(key) == value for key, value in wanted.items())), None)

        return wait_for(found, START_TIMEOUT_S, f"event {wanted}")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def finish(self) -> int:
        _, self.errors = self.process.communicate(timeout=FINISH_TIMEOUT_S)
        return self.process.returncode


@pytest.mark.reliability
def test_run_survives_stop_damage_and_kills_between_its_parts(
    toy_manifest: Path, toy_tree: Path, tmp_path: Path
) -> None:
    """One run, in order: SIGTERM during detection, a damaged checkpoint, SIGKILL between the tasks, SIGKILL during the
    evaluation.
    """
    overrides = {"detection__epochs": 3, "classification__epochs": 2}
    arguments = (tmp_path / "run", toy_manifest, toy_tree, overrides)
    folder = tmp_path / "run" / "checkpoints" / "detection"

    driver = Driver(*arguments)
    driver.await_event(kind="checkpoint", epoch=1)
    requested_s = time.monotonic()
    driver.process.send_signal(signal.SIGTERM)
    assert driver.finish() == 130, driver.errors
    stopped_s = time.monotonic() - requested_s
    last, _ = find_checkpoint(folder)
    assert last is not None and last.position.global_step >= max(e["step"] for e in raw_events(driver.run_dir, "step"))
    assert stopped_s <= 30

    data = bytearray((last.path / "ema.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (last.path / "ema.safetensors").write_bytes(bytes(data))
    snapshot = driver.run_dir / "ray" / "detection-0" / "checkpoint_manager_snapshot.json"
    snapshot.parent.mkdir(parents=True)
    snapshot.write_text('{"checkpoint_results": [{"che')  # torn, as a killed driver may leave it
    driver = Driver(*arguments)
    started = driver.await_event(kind="task", task="detection", status="started")
    assert 0 < started["step"] < last.position.global_step
    driver.await_event(kind="task", task="detection", status="finished")
    driver.kill()
    warnings = [e["message"] for e in raw_events(driver.run_dir, "warning")]
    assert any(str(last.path / "ema.safetensors") in text and "damaged" in text for text in warnings)

    driver = Driver(*arguments)
    driver.await_event(kind="task", task="classification", status="finished")
    time.sleep(random.Random(5).uniform(0.0, 1.0))
    driver.kill()
    assert not (driver.run_dir / "metrics.json").exists()
    mine = [e for e in raw_events(driver.run_dir) if e["time"] >= driver.started_s]
    first = next(e for e in mine if e["kind"] == "task")
    assert (first["task"], first["status"]) == ("detection", "skipped")
    assert not [e for e in mine if e["kind"] == "step" and e["task"] == "detection"]

    driver = Driver(*arguments)
    assert driver.finish() == 0, driver.errors
    mine = [e for e in raw_events(driver.run_dir) if e["time"] >= driver.started_s]
    assert [(e["task"], e["status"]) for e in mine if e["kind"] == "task"] == [
        ("detection", "skipped"), ("classification", "skipped"),
    ]  # fmt: skip
    events = read_events(driver.run_dir)
    assert [e["epoch"] for e in events if e["kind"] == "epoch"] == [1, 2, 3, 1, 2]
    spent = {e["task"]: e["duration_s"] for e in events if e["kind"] == "task" and e["status"] == "finished"}
    metrics = json.loads((driver.run_dir / "metrics.json").read_text())
    assert metrics["total_time_s"] == pytest.approx(sum(spent.values()), abs=0.1)
    lived = [e for e in raw_events(driver.run_dir, "step") if e["task"] == "detection"]
    assert spent["detection"] >= lived[-1]["time"] - started["time"]
    say(
        5, 5,
        f"SIGTERM (ended after {stopped_s:.1f} s with a checkpoint of that moment), a damaged checkpoint and a torn "
        "snapshot of Ray's, SIGKILL between the tasks and within the judging: only the rest is done, the times add up",
    )  # fmt: skip


@pytest.mark.reliability
def test_ten_killed_drivers_lose_nothing_committed(toy_manifest: Path, toy_tree: Path, tmp_path: Path) -> None:
    overrides = {
        "train__task": "classification", "classification__epochs": 80, "train__checkpoint_minutes": 0.005,
    }  # fmt: skip
    arguments = (tmp_path / "run", toy_manifest, toy_tree, overrides)
    folder = tmp_path / "run" / "checkpoints" / "classification"
    chance = random.Random(10)
    continued, before = 0, 0
    for _ in range(10):
        driver = Driver(*arguments)
        started = driver.await_event(kind="task", status="started")
        continued += started["step"] == before
        time.sleep(chance.uniform(0.0, 4.0))
        if driver.process.poll() is not None:
            break
        driver.kill()
        last, damaged = find_checkpoint(folder)
        assert damaged == []
        before = last.position.global_step if last else 0
        committed = [e["step"] for e in raw_events(driver.run_dir, "checkpoint")]
        assert before >= max(committed, default=0)
        # Workers of the dead driver may live a moment longer and commit one more.
        wait_for(lambda: not _alive(tmp_path / "run"), 60, "end of the workers")
        last, _ = find_checkpoint(folder)
        before = last.position.global_step if last else 0
    driver = Driver(*arguments)
    assert driver.finish() == 0, driver.errors
    events = read_events(driver.run_dir)
    assert [e["epoch"] for e in events if e["kind"] == "epoch"] == list(range(1, 81))
    say(continued, 10, "SIGKILL of the driver and the same command again: it continues from the last checkpoint")


def _alive(run_dir: Path) -> list[int]:
    """Workers of earlier drivers, by the run's log, that are still running."""
    log = (run_dir / "train.log").read_text() if (run_dir / "train.log").exists() else ""
    pids = [int(line.split(", process ")[1].split(",")[0]) for line in log.splitlines() if ", process " in line]
    return [pid for pid in pids if is_running(pid)]


@pytest.mark.reliability
def test_ten_runs_leave_no_processes_memory_or_files(toy_manifest: Path, toy_tree: Path, tmp_path: Path) -> None:
    overrides = {"detection__epochs": 1, "detection__mosaic_off_epochs": 0, "classification__epochs": 1,
                 "detection__warmup_epochs": 0, "classification__warmup_epochs": 0}  # fmt: skip
    command = [sys.executable, "-m", "tests.reliability.driver", str(tmp_path), str(toy_manifest), str(toy_tree)]
    with tempfile.TemporaryDirectory(prefix="pillsnap-ten-") as temporary:  # other programs have folders in /tmp, too
        done = subprocess.run(
            [*command, json.dumps(overrides), "10"],
            cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | {"TMPDIR": temporary},
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    after = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(after) == 10
    # The first two runs load what stays loaded: libraries, and the allocator's arenas.
    growth = after[-1]["rss"] / after[1]["rss"] - 1
    clean = sum(not run["processes"] for run in after)
    for what in ("shared_memory", "temporary", "sessions"):
        new = set(after[-1][what]) - set(after[0][what])
        assert not new, (what, new)
    assert growth < 0.02, [run["rss"] for run in after]
    say(clean, 10, f"ten runs in a row: no process, shared memory or folder left, resident memory {growth:+.1%}")
