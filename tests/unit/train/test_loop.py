"""The training loop with a small task and prepared batches: events, stops, resumes, and non-finite steps."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pillsnap.config import load_settings
from pillsnap.data.loader import DeviceBatch
from pillsnap.data.plan import StreamPlan
from pillsnap.errors import UserError
from pillsnap.observe.events import EventLog, read_events
from pillsnap.runs.checkpoint import Checkpoint, Position, find_checkpoint
from pillsnap.train.job import Job
from pillsnap.train.loop import train
from pillsnap.train.schedule.time_budget import TimeBudget
from pillsnap.train.step import device_readback
from tests.reliability.harness import StoppableBackend, same_state

CPU = torch.device("cpu")
SETTINGS = load_settings("demo", {"train.amp": "off", "train.compile": "off", "train.log_every_steps": 1})
PLAN = StreamPlan(seed=0, epochs=2, num_train=12, num_val=8, batch_size=4, num_workers=1)  # 3 and 2 steps per epoch


class SmallTask:
    """Classifies noise by a small network with batch normalisation and dropout; its loss is NaN at `bad_steps`."""

    name, best_metric = "classification", "top1"
    settings = SimpleNamespace(lr=0.01, weight_decay=0.01, warmup_epochs=1, final_lr_fraction=0.1)

    def __init__(self, bad_steps: tuple[int, ...] = ()) -> None:
        self.bad_steps = bad_steps

    def build(self) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(0.3), nn.Linear(144, 2))

    def independent_epochs(self, model: nn.Module) -> int:
        return 10**6

    def input_size_px(self, epoch: int) -> int:
        return 8

    def forward(self, model: nn.Module, batch: DeviceBatch) -> torch.Tensor:
        return model(batch.images.permute(0, 3, 1, 2) / 255)

    def losses(self, model: nn.Module, batch: DeviceBatch) -> dict[str, torch.Tensor]:
        logits = self.forward(model, batch)
        loss = nn.functional.cross_entropy(logits, batch.targets["label"], reduction="sum")
        step = batch.epoch * PLAN.train_steps + batch.step + 1
        return {"cross_entropy": loss * float("nan") if step in self.bad_steps else loss}

    def validate(self, model: nn.Module, batch: DeviceBatch) -> list[tuple[int, float]]:
        logits = self.forward(model, batch)
        return [(int(right == 0), float(row.sum())) for right, row in zip(batch.targets["label"], logits, strict=True)]

    def score(self, facts: list[tuple[int, float]]) -> dict[str, float]:
        assert len(facts) == PLAN.num_val  # of every plan here
        return {"top1": float(np.mean([rank == 0 for rank, _ in facts])), "sum": sum(value for _, value in facts)}


def batches_from(position: Position, plan: StreamPlan = PLAN) -> Iterator[DeviceBatch]:
    """The batches from `position` on; each is a function of its place in the stream."""
    for number in range(plan.first_slot(position.epoch, position.epoch_step), plan.num_slots):
        slot = plan.slot(number)
        rng = np.random.default_rng(number)
        images = torch.from_numpy(rng.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8))
        targets = {"label": torch.from_numpy(rng.integers(0, 2, 4)), "valid": torch.ones(4, dtype=torch.bool)}
        yield DeviceBatch(slot.epoch, slot.training, slot.step, images, targets, slot.members, 4)


class LoopOfOne:
    """Runs of the loop in one directory; each continues from the last checkpoint."""

    def __init__(
        self,
        run_dir: Path,
        bad_steps: tuple[int, ...] = (),
        checkpoint_minutes: float = 10.0,
        plan: StreamPlan = PLAN,
        **train: Any,
    ) -> None:
        self.run_dir, self.task, self.plan = run_dir, SmallTask(bad_steps), plan
        self.settings = SETTINGS.train.model_copy(update={"checkpoint_minutes": checkpoint_minutes} | train)
        self.budget: TimeBudget | None = None
        self.reported: list[dict[str, float]] = []
        self.batches_from: Callable[[Position], Iterator[DeviceBatch]] = partial(batches_from, plan=plan)
        self.data = SETTINGS.data

    def last(self) -> Checkpoint:
        found, damaged = find_checkpoint(self.run_dir / "checkpoints" / "classification")
        assert found is not None and damaged == []
        return found

    def train(self, stop_at: Callable[[int], bool] = lambda polls: False) -> Position:
        """`stop_at(polls)` is asked after every step of training and validation, and at the end of an epoch."""
        polls = itertools.count(1)
        backend = StoppableBackend(self.run_dir, "classification", lambda: stop_at(next(polls)))
        resume, _ = backend.last_checkpoint()
        with EventLog(self.run_dir) as events:
            position = resume.position if resume else Position()
            events.write("task", task=self.task.name, status="started", epoch=position.epoch, step=position.global_step)
            task: Any = self.task
            job = Job(
                task=task, plan=self.plan, train=self.settings, data=self.data, device=CPU, backend=backend, meta={},
                resume=resume, elapsed_before_s=resume.meta["elapsed_s"] if resume else 0.0, events=events,
                preempted=lambda: False, budget=self.budget,
                sample_ids=lambda numbers: [f"photo{number}" for number in numbers], report=self.reported.append,
            )  # fmt: skip
            return train(job, self.batches_from(position))

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        return [event for event in read_events(self.run_dir) if event["kind"] in kinds]


def test_order_of_events_checkpoints_and_reports(tmp_path: Path) -> None:
    loop = LoopOfOne(tmp_path)
    assert loop.train() == Position(2, 0, 6)
    events = loop.events("step", "epoch", "examples", "validation")
    epoch = ["step", "step", "step", "epoch", "examples", "validation"]
    assert [event["kind"] for event in events] == epoch * 2
    assert [event["step"] for event in events if event["kind"] == "step"] == [1, 2, 3, 4, 5, 6]
    assert [(event["epoch"], event["step"]) for event in loop.events("checkpoint")] == [(1, 3), (2, 6)]
    assert [report["epoch"] for report in loop.reported] == [1, 2]
    losses = [event["loss"] for event in events if event["kind"] == "step"]
    means = [event["loss"] for event in events if event["kind"] == "epoch"]
    assert means == pytest.approx([np.mean(losses[:3]), np.mean(losses[3:])])
    rates = [event["lr"] for event in events if event["kind"] == "step"]
    assert rates[:3] == pytest.approx([0.01 / 3, 0.02 / 3, 0.01]) and rates[3] > rates[4] > rates[5]
    metrics = loop.events("validation")[-1]["metrics"]
    assert loop.last().meta["metrics"] == metrics
    assert loop.last().trainer_state()["progress"] == {"quarantined": {}, "num_seen": 40}


# One poll per step: 3 of training, 2 of validation, and one at the end of the epoch.
STOPS = [
    (2, Position(0, 2, 2)),
    (3, Position(0, 3, 3)),
    (4, Position(0, 3, 3)),  # in validation, which starts again
    (6, Position(1, 0, 3)),
    (8, Position(1, 2, 5)),
]


@pytest.mark.parametrize(("poll", "position"), STOPS)
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(poll: int, position: Position, tmp_path: Path) -> None:
    whole, stopped = LoopOfOne(tmp_path / "whole"), LoopOfOne(tmp_path / "stopped")
    whole.train()
    assert stopped.train(stop_at=lambda polls: polls == poll) == position
    assert stopped.last().position == position
    assert stopped.train() == Position(2, 0, 6)
    assert same_state(whole.last(), stopped.last()) == []
    metrics = [[event["metrics"] for event in loop.events("validation")] for loop in (whole, stopped)]
    assert metrics[0] == metrics[1] and len(metrics[0]) == 2


def test_checkpoint_keeps_photos_quarantined_since_the_last_step_event(tmp_path: Path) -> None:
    def with_bad_photos(position: Position) -> Iterator[DeviceBatch]:
        for batch in batches_from(position):
            batch.quarantine = [(f"photo-{batch.epoch}-{batch.step}", "torn")] if batch.training else []
            yield batch

    ends = []
    for name, stops in (("whole", []), ("stopped", [2, 2, 1])):
        loop = LoopOfOne(tmp_path / name)
        loop.settings = loop.settings.model_copy(update={"log_every_steps": 1000})
        loop.batches_from = with_bad_photos
        loop.data = loop.data.model_copy(update={"quarantine_fraction": 1.0})
        for stop in stops:
            loop.train(stop_at=lambda polls, stop=stop: polls == stop)  # type: ignore[misc]
            progress = loop.last().trainer_state()["progress"]
            written = [event["sample_id"] for event in loop.events("quarantine")]
            position = loop.last().position
            seen = [(e, s) for e in range(2) for s in range(3) if (e, s) < (position.epoch, position.epoch_step)]
            assert list(progress["quarantined"]) == written == [f"photo-{epoch}-{step}" for epoch, step in seen]
        loop.train()
        ends.append((loop.last().trainer_state()["progress"], [e["sample_id"] for e in loop.events("quarantine")]))
    assert ends[0] == ends[1] and len(ends[0][1]) == 6 and ends[0][0]["num_seen"] == 40


@pytest.mark.parametrize("lag", [0, 2])
def test_three_non_finite_steps_in_a_row_end_the_run(lag: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_readback, "lag_steps", lambda device: lag)
    loop = LoopOfOne(tmp_path, bad_steps=(1, 3, 4, 5))
    with pytest.raises(UserError, match=r"stopped at step 5: 3 steps in a row .* step 3: photo\d+, .* step 5: photo"):
        loop.train()
    warnings = [event["message"] for event in loop.events("warning")]
    assert [text.partition(" at step ")[2].partition(":")[0] for text in warnings] == ["1", "3", "4", "5"]
    assert loop.last().position == Position(1, 0, 3)


def test_non_finite_step_is_not_checkpointed(tmp_path: Path) -> None:
    """A checkpoint is due after every step; a stop requested at the bad step waits for the next good one."""
    loop = LoopOfOne(tmp_path, bad_steps=(2, 5), checkpoint_minutes=1e-12)
    assert loop.train(stop_at=lambda polls: polls >= 2) == Position(0, 3, 3)
    assert [event["step"] for event in loop.events("checkpoint")] == [1, 3]
    assert loop.train() == Position(2, 0, 6)
    assert 5 not in [event["step"] for event in loop.events("checkpoint")]


def test_batch_of_another_position_is_refused(tmp_path: Path) -> None:
    loop = LoopOfOne(tmp_path)
    loop.batches_from = lambda position: batches_from(Position(0, 1, 1))
    with pytest.raises(AssertionError, match=r"the stream is at \(0, True, 1\), the loop at \(0, True, 0\)"):
        loop.train()
