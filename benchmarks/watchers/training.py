"""The training of `benchmarks.watching`: start, stop, and step rate from its log.

    python -m benchmarks.watchers.training RUN_DIR THREADS

It repeats one batch, so that no wait for data hides the cost of observers.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pillsnap.observe.events import EventFollower, EventLog
from pillsnap.runs.directory import STOP_FILE

BATCH = 16
# Pairs with a window of fewer steps are discarded: the machine was busy.
MIN_STEPS = 50


class Training:
    """The training loop in a separate process; `stop` ends it at the next step."""

    def __init__(self, folder: Path, name: str, num_threads: int | None = None) -> None:
        self.run_dir = folder / name
        self.run_dir.mkdir(parents=True)
        with (self.run_dir / "console.log").open("wb") as console:
            command = [sys.executable, "-m", "benchmarks.watchers.training", str(self.run_dir)]
            command += [str(num_threads or os.cpu_count())]
            self.process = subprocess.Popen(command, stdout=console, stderr=console)

    def stop(self) -> None:
        (self.run_dir / STOP_FILE).touch()
        assert self.process.wait(180) == 0, (self.run_dir / "console.log").read_text()[-2000:]


class Window:
    """A time span (Unix seconds) with or without observers, and the CPU time of the training in it."""

    def __init__(self, running: bool, start: float, end: float, cpu_s: float) -> None:
        self.running, self.start, self.end, self.cpu_s = running, start, end, cpu_s


class StepLog:
    """Logged steps of a training with their times."""

    def __init__(self, run_dir: Path) -> None:
        self.follower = EventFollower(run_dir)
        self.steps: list[tuple[float, int]] = []  # unix time, step

    def poll(self) -> int:
        """The latest step."""
        self.steps += [(event["time"], event["step"]) for event in self.follower.poll() if event["kind"] == "step"]
        return self.steps[-1][1] if self.steps else 0

    def wait_for_step(self, step: int, training: Training) -> None:
        end_s = time.monotonic() + 900
        while self.poll() < step:
            assert training.process.poll() is None, (training.run_dir / "console.log").read_text()[-2000:]
            assert time.monotonic() < end_s, f"only {self.poll()} steps"
            time.sleep(0.2)

    def steps_per_s(self, window: Window) -> float:
        """Step rate between the first and the last step logged within a window."""
        self.poll()
        inside = [step for step in self.steps if window.start <= step[0] <= window.end]
        (start_s, first), (end_s, last) = (inside[0], inside[-1]) if inside else ((0.0, 0), (0.0, 0))
        return (last - first) / (end_s - start_s) if last - first >= MIN_STEPS else math.nan


def run_training(run_dir: Path, num_threads: int) -> None:
    """Train on one batch repeatedly until the stop file exists."""
    import numpy as np
    import torch

    from pillsnap.config import load_settings
    from pillsnap.data.loader import DeviceBatch
    from pillsnap.data.plan import StreamPlan
    from pillsnap.runs.backend import LocalBackend
    from pillsnap.tasks.registry import make_task
    from pillsnap.train.job import Job
    from pillsnap.train.loop import train

    overrides = {
        "train.amp": "off",
        "train.checkpoint_minutes": 1e6,
        "classification.epochs": 1,
        "classification.batch_size": BATCH,
        "classification.warmup_epochs": 0,
    }
    settings = load_settings("demo", overrides)
    torch.set_num_threads(num_threads)
    torch.manual_seed(0)
    codes = [f"K-{number:06d}" for number in range(8)]
    images = torch.randint(0, 255, (BATCH, 64, 64, 3), dtype=torch.uint8)
    targets = {"label": torch.arange(BATCH) % len(codes), "valid": torch.ones(BATCH, dtype=torch.bool)}
    plan = StreamPlan(seed=0, epochs=1, num_train=BATCH * 10**6, num_val=BATCH, batch_size=BATCH, num_workers=1)
    with EventLog(run_dir) as events:
        facts: dict[str, Any] = {"stage": None, "config": {}, "manifest_hash": "h", "num_workers": 1, "versions": {}}
        events.write("run", run_id=run_dir.name, name=run_dir.name, **facts)
        events.write("task", task="classification", status="started", epochs=1, steps_per_epoch=plan.train_steps)
        job = Job(
            task=make_task("classification", settings, codes), plan=plan, train=settings.train, data=settings.data,
            device=torch.device("cpu"), backend=LocalBackend(run_dir, "classification"), meta={}, resume=None,
            elapsed_before_s=0.0, events=events, sample_ids=lambda numbers: [str(number) for number in numbers],
            preempted=lambda: False, report=lambda metrics: None,
        )  # fmt: skip
        batches = (DeviceBatch(0, True, step, images, targets, np.arange(BATCH), BATCH) for step in range(10**6))
        train(job, batches)


if __name__ == "__main__":
    run_training(Path(sys.argv[1]), int(sys.argv[2]))
