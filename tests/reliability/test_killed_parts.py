"""SIGKILL of driver, raylet, GCS, worker or all at random times, and the same command again: the end is that of the
uninterrupted run, bit for bit, and no process is left. PILLSNAP_KILLS is the number of kills.
"""

from __future__ import annotations

import ctypes
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
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
RAYS_LINE = "Failed to connect to GCS within 10 seconds"
"""With exit code 1: where ray.init connects in native code with the interpreter's lock, nothing of ours can run."""
KILLS = int(os.environ.get("PILLSNAP_KILLS", "5"))
_PR_SET_CHILD_SUBREAPER = 36


@pytest.fixture
def left() -> Iterator[Callable[[], list[psutil.Process]]]:
    """The running processes that this test started, directly or not: orphans become children of this process."""
    prctl = ctypes.CDLL(None).prctl
    prctl(_PR_SET_CHILD_SUBREAPER, 1)
    before = descendants()
    yield lambda: [process for process in descendants() if process not in before and is_running(process.pid)]
    prctl(_PR_SET_CHILD_SUBREAPER, 0)


def driver_of(run_dir: Path, manifest: Path, root: Path, kills: int) -> Driver:
    """The command, with more epochs than fit between so many kills."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / FAULTS_FILE).write_text('{"threads": 1, "step_pause_s": 0.05}')
    settings = {
        "train__task": "classification", "classification__epochs": 20 + 5 * kills, "train__checkpoint_minutes": 0.005,
        "wandb__mode": "offline",
    }  # fmt: skip
    return Driver(run_dir, manifest, root, settings)


def kill(driver: Driver, part: str) -> None:
    """SIGKILL of a part of the run, once it is there; of all processes for `tree`."""
    if part in ("driver", "tree"):
        for process in descendants(driver.process.pid) if part == "tree" else []:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        driver.kill()
    else:
        title = "TrainWorker" if part == "worker" else f"/{part}"
        wait_for(lambda: titled(title, driver.process.pid), 60, part)[0].kill()


def kill_parts(
    run_dir: Path, manifest: Path, root: Path, parts: Sequence[str], left: Callable[[], list[psutil.Process]]
) -> tuple[list[float], list[str]]:
    """Run a training with these kills to its end; returns after what times all was gone, and what was wrong."""
    chance, gone_s, wrong = random.Random(len(parts)), [], []
    for number, part in enumerate(parts):
        driver = driver_of(run_dir, manifest, root, len(parts))
        if part == "worker" or chance.random() < 0.6:
            driver.await_event(kind="task", status="started")
            time.sleep(chance.uniform(0.0, 3.0))
        else:
            time.sleep(chance.uniform(0.0, 9.0))  # while Ray starts
        assert driver.process.poll() is None, f"the run ended before kill {number}"
        kill(driver, part)
        killed_s = time.time()
        if part in ("raylet", "gcs_server"):
            code, line = driver.finish(), driver.errors.splitlines()[-1]
            ended_by_ray = part == "gcs_server" and code == 1 and RAYS_LINE in line
            if not ended_by_ray and (code != 2 or "head process has ended" not in line):
                wrong.append(f"{number} {part}: exit {code}, {line}")
        elif part == "worker":  # the run goes on
            driver.started_s = killed_s
            driver.await_event(kind="task", status="started")
            killed_s = time.time()
            driver.kill()
        while left() and time.time() < killed_s + GONE_WITHIN_S:
            time.sleep(0.1)
        gone_s.append(time.time() - killed_s)
        wrong += [f"{number} {part}: left {command_line(process)[:3]}" for process in left()]
    driver = driver_of(run_dir, manifest, root, len(parts))
    assert driver.finish() == 0, driver.errors
    return gone_s, wrong


UNWATCHED = """
import time
from pillsnap.ray_compat.minimal_cluster import local_cluster
from tests.processes import titled
with local_cluster():
    (gcs,) = titled("/gcs_server")
    gcs.kill()
    print(time.time(), flush=True)
    time.sleep(90)
"""


@pytest.mark.reliability
def test_a_process_that_cannot_notice_it_outlives_the_gcs_by_seconds() -> None:
    done = subprocess.run([sys.executable, "-c", UNWATCHED], capture_output=True, text=True, timeout=120)
    after_s = time.time() - float(done.stdout)
    assert done.returncode == 1 and RAYS_LINE in done.stderr
    say(int(after_s < GONE_WITHIN_S), 1, f"a process that cannot notice it ended {after_s:.0f} s after the GCS")


@pytest.mark.reliability
def test_killed_parts_leave_nothing_and_change_nothing(
    toy_manifest: Path, toy_tree: Path, tmp_path: Path, left: Callable[[], list[psutil.Process]]
) -> None:
    parts = [PARTS[number % len(PARTS)] for number in range(KILLS)]
    random.Random(KILLS).shuffle(parts)
    gone_s, wrong = kill_parts(tmp_path / "killed", toy_manifest, toy_tree, parts, left)
    whole = driver_of(tmp_path / "whole", toy_manifest, toy_tree, KILLS)
    assert whole.finish() == 0, whole.errors
    ends = [find_checkpoint(tmp_path / name / "checkpoints" / "classification")[0] for name in ("killed", "whole")]
    assert same_state(*ends) == []
    losses = [
        [(e["step"], e["loss"]) for e in read_events(tmp_path / name) if e["kind"] == "step"]
        for name in ("killed", "whole")
    ]
    assert losses[0] == losses[1]
    say(
        KILLS - len(wrong), KILLS,
        "SIGKILL of driver, raylet, GCS, worker or all: same end bit for bit, no process left after "
        f"{statistics.median(gone_s):.1f} s, at most {max(gone_s):.1f} s {wrong or ''}",
    )  # fmt: skip
