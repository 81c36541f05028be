"""More than 1 % unreadable photos stop a run, once 200 samples were seen."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pillsnap.config import DataSettings
from pillsnap.errors import UserError
from pillsnap.train.step.collectives import WorkerGroup
from pillsnap.train.task_log import TaskLog


class Events:
    """Collects events."""

    def __init__(self) -> None:
        self.written: list[dict[str, Any]] = []

    def write(self, kind: str, **fields: Any) -> None:
        self.written.append({"kind": kind, **fields})


@pytest.fixture
def log() -> TaskLog:
    job: Any = SimpleNamespace(
        task=SimpleNamespace(name="classification"), events=Events(), data=DataSettings(),
        plan=SimpleNamespace(num_train=900, num_val=100),
    )  # fmt: skip
    return TaskLog(job, WorkerGroup(torch.device("cpu")), {})


def see(log: TaskLog, num_samples: int, bad: list[str]) -> None:
    """Count a batch of `num_samples` with the unreadable photos `bad` and two empty rows."""
    index = torch.tensor([*range(num_samples), -1, -1])
    batch: Any = SimpleNamespace(index=index, quarantine=[(name, f"truncated: {name} is cut") for name in bad])
    log.count(batch)
    log.flush_quarantine()


def test_no_stop_before_200_samples(log: TaskLog) -> None:
    see(log, 199, ["a", "b", "c"])


def test_more_than_the_budget_stops_the_run_with_their_list(log: TaskLog) -> None:
    see(log, 200, ["a", "b"])
    see(log, 99, [])
    with pytest.raises(UserError) as error:
        see(log, 0, ["c", "d"])
    text = str(error.value)
    assert text.startswith("4 of 299 classification samples cannot be read, more than the 1.0%")
    for name in "abcd":
        assert f"{name} (truncated: {name} is cut)" in text
    assert "pillsnap manifest validate --deep" in text
    assert "\n" not in text


def test_each_photo_counts_once_over_all_epochs(log: TaskLog) -> None:
    for _ in range(30):  # epochs within the budget
        see(log, 1000, [f"p{number}" for number in range(10)])
    written = log._job.events.written
    assert [entry["sample_id"] for entry in written] == [f"p{number}" for number in range(10)]
    assert written[0] == {
        "kind": "quarantine", "task": "classification", "sample_id": "p0", "reason": "truncated: p0 is cut",
    }  # fmt: skip
    with pytest.raises(UserError, match="11 of 1000"):
        see(log, 1000, ["another"])


def test_resumed_run_keeps_its_counts(log: TaskLog) -> None:
    see(log, 200, ["a", "b"])
    again = TaskLog(log._job, log._group, log.progress)
    see(again, 50, ["a"])  # 2 of 250
    with pytest.raises(UserError, match="3 of 260"):
        see(again, 10, ["c"])


def test_small_sets_stop_when_the_share_is_certain(log: TaskLog) -> None:
    see(log, 20, ["a", "b"])  # may be chance at 1 %
    with pytest.raises(UserError, match="3 of 20"):
        see(log, 0, ["c"])
