"""What of the run's time a task may take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from pillsnap.config import load_settings
from pillsnap.errors import UserError
from pillsnap.files import write_json
from pillsnap.observe.events import EventLog
from pillsnap.runs.checkpoint import Position, save_checkpoint
from pillsnap.runs.directory import Run
from pillsnap.train.schedule.time_budget import TimeBudget, task_budget

MANIFEST = pa.table({"split": ["train"] * 6 + ["val"] * 3, "codes": [["a"]] * 5 + [["a", "b", "c"]] + [["a"]] * 3})
"""Six training photos with eight pills, and three photos to evaluate on; the evaluation fits
likeness to the former."""
SIZES = {
    "detection.image_size_px": 128, "detection.epochs": 6, "classification.image_size_px": 64,
    "classification.epochs": 9,
}  # fmt: skip


def run_of(run_dir: Path, minutes: float | None = 60.0, **more: Any) -> Run:
    given = {"train.schedule": "wsd", "train.time_budget_minutes": minutes} | SIZES | more
    return Run(run_dir, load_settings("demo", given), MANIFEST, "hash", [], "", "run")


def trained(run: Run, task: str, epochs: int, elapsed_s: float) -> None:
    weights = {"w": torch.ones(1)}
    save_checkpoint(
        run.checkpoint_dir(task), Position(epochs, 0, 10), model=weights, ema=weights, trainer={},
        meta={"elapsed_s": elapsed_s}, best=True, keep=1,
    )  # fmt: skip


def test_no_limit_without_a_setting(tmp_path: Path) -> None:
    run = run_of(tmp_path, None)
    assert task_budget(run, "detection") is None


def test_first_task_gets_its_share_of_the_planned_pixels(tmp_path: Path) -> None:
    """6 epochs of 6 photos at four times the pixels, against 9 epochs of 8 crops: 144 of 216."""
    assert task_budget(run_of(tmp_path), "detection") == TimeBudget(3600, 0.0, 144 / 216, 9)
    fewer = run_of(tmp_path, **{"detection.samples_per_epoch": 3})
    assert task_budget(fewer, "detection") == TimeBudget(3600, 0.0, 72 / 144, 9)
    alone = run_of(tmp_path, **{"train.task": "detection"})
    assert task_budget(alone, "detection") == TimeBudget(3600, 0.0, 1.0, 3)


def test_last_task_gets_what_the_first_left(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    trained(run, "detection", 6, 1000.0)
    write_json(run.checkpoint_dir("detection") / "elapsed.json", {"elapsed_s": 1003.5})
    with EventLog(tmp_path) as events:
        events.write("task", task="detection", status="started", num_val=4)
        events.write("validation", task="detection", epoch=6, step=10, metrics={}, duration_s=8.0)
        events.write("task", task="detection", status="finished")
    # Of the detector, three photos: 2 s each by the validation. Likeness is fitted to the other six as well.
    assert task_budget(run, "classification") == TimeBudget(3600, 1003.5, 1.0, 9, 6.0)


def test_nothing_left_is_refused(tmp_path: Path) -> None:
    run = run_of(tmp_path, 10.0)
    trained(run, "detection", 6, 660.0)
    with pytest.raises(
        UserError, match=r"time_budget_minutes=10 leaves no time for classification: 11 minutes are spent"
    ):
        task_budget(run, "classification")
