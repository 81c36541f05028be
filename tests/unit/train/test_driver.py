"""When a task counts as finished: its exported model is that of the training that ended last."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from pillsnap.config import load_settings
from pillsnap.observe.events import EventLog, read_events
from pillsnap.runs.checkpoint import Checkpoint
from pillsnap.runs.directory import Run
from pillsnap.train import driver
from pillsnap.train.driver import _is_finished


@pytest.mark.parametrize(
    ("statuses", "finished"),
    [
        ([], False),
        (["started"], False),
        (["started", "finished"], True),
        (["started", "finished", "skipped"], True),
        (["started", "finished", "started"], False),  # extended, and killed before its new export
    ],
)
def test_task_is_finished_when_the_log_ends_with_its_end(statuses: list[str], finished: bool, tmp_path: Path) -> None:
    run = Run(tmp_path, load_settings("demo"), pa.table({}), "hash", [], "", "run")
    with EventLog(tmp_path) as log:
        for status in statuses:
            log.write("task", task="detection", status=status)
        log.write("task", task="classification", status="finished")
    assert _is_finished(run, "detection") is finished


def test_training_that_ends_between_validations_is_started_once_more(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    early = {"reason": "budget", "first_step": 3, "end_step": 5, "end_epoch": 2, "ends_between_validations": True}
    positions = [
        {"epoch": 0, "epoch_step": 0, "global_step": 0},
        {"epoch": 1, "epoch_step": 4, "global_step": 5},
        {"epoch": 2, "epoch_step": 0, "global_step": 5},
    ]
    starts: list[dict[str, int]] = []

    def find(*_: Any, **__: Any) -> tuple[Checkpoint, list[str]]:
        meta = {"position": positions[len(starts)], "elapsed_s": 1.0, "schedule": early}
        return Checkpoint(tmp_path, meta), []

    def nothing(*_: Any, **__: Any) -> Any:
        return None

    monkeypatch.setattr(driver, "find_run_checkpoint", find)
    monkeypatch.setattr(driver, "fit", lambda *_: starts.append(positions[len(starts)]))
    monkeypatch.setattr(driver, "within_room", lambda stream, *_: (stream, ""))
    task = SimpleNamespace(settings=SimpleNamespace(epochs=9), samples=nothing, recipe=nothing)
    monkeypatch.setattr(driver, "make_task", lambda *_: task)
    for name in (
        "task_budget",
        "_check_samples",
        "make_stream",
        "make_trainer",
        "store_folder",
        "_boxes_for_unlabelled",
    ):
        monkeypatch.setattr(driver, name, nothing)
    best = SimpleNamespace(task=SimpleNamespace(export=nothing), model=None, metrics={})
    monkeypatch.setattr(driver, "load_best", lambda *_: best)
    run = Run(tmp_path, load_settings("demo"), pa.table({}), "hash", [], "", "run")
    with EventLog(tmp_path) as log:
        driver._train_task(run, "classification", driver.Workers(1, 1, use_gpu=False), log, None)
    assert starts == positions[:2]
    (finished,) = [event for event in read_events(tmp_path) if event["kind"] == "task"]
    assert (finished["status"], finished["epoch"], finished["step"]) == ("finished", 2, 5)
