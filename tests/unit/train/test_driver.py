"""When a task counts as finished: its exported model is that of the training that ended last."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from pillsnap.config import load_settings
from pillsnap.observe.events import EventLog
from pillsnap.runs.directory import Run
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
