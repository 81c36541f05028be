"""Compiled training: which batches compile the model again."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from pillsnap.config import load_settings
from pillsnap.data.loader import DeviceBatch
from pillsnap.planner.measure import mock_batch
from pillsnap.tasks.registry import make_task
from pillsnap.train.step.collectives import WorkerGroup
from pillsnap.train.step.microbatch import MicrobatchRunner
from pillsnap.train.step.training_state import TrainingState

CPU = torch.device("cpu")
SMALL = {
    "detection.image_size_px": 64, "classification.image_size_px": 64, "train.amp": "off", "train.compile": "on",
}  # fmt: skip


@pytest.fixture(autouse=True)
def dynamo_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Traces and guards as ever, but generates no code; each graph is counted."""
    compiled = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: compiled(self, backend="eager", **options))
    monkeypatch.setattr("pillsnap.train.step.training_state.compile_problem", lambda device: None)
    torch.set_num_threads(1)
    with torch._dynamo.config.patch(suppress_errors=False, fail_on_recompile_limit_hit=False):
        torch._dynamo.reset()
        counters.clear()
        yield
        torch._dynamo.reset()


def new_state(name: str, **changes: object) -> TrainingState:
    settings = load_settings("demo", SMALL | {key.replace("__", "."): value for key, value in changes.items()})
    task = make_task(name, settings, ["K-1", "K-2"])
    group = WorkerGroup(CPU)
    state = TrainingState(task, settings.train, CPU, group, MicrobatchRunner(task.name, 4, group, None, print), None)
    torch._dynamo.config.suppress_errors, torch._dynamo.config.fail_on_recompile_limit_hit = False, True
    return state


def with_empty_rows(batch: DeviceBatch, *rows: int, unreadable: bool = False) -> DeviceBatch:
    for row in rows:
        batch.targets["valid"][row] = False
        batch.index[row] = batch.index[row] if unreadable else -1
    batch.num_valid -= len(rows)
    return batch


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("detection", {}), ("detection", {"detection__model": "yolo26n"}), ("classification", {}),
        ("classification", {"classification__mixup": 0.2}),
    ],
)  # fmt: skip
def test_every_batch_of_a_run_has_the_shape_of_the_first(name: str, changes: dict[str, object]) -> None:
    """An unreadable photo, the last batch of an epoch and a worker without samples use the graph of a full batch."""
    state = new_state(name, **changes)
    state.step(mock_batch(state._task, 4, CPU, 2), 0.01, 4, 0)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    partial = [
        with_empty_rows(mock_batch(state._task, 4, CPU, 2), 1, unreadable=True),
        with_empty_rows(mock_batch(state._task, 4, CPU, 2), 2, 3),
        with_empty_rows(mock_batch(state._task, 4, CPU, 2), 0, 1, 2, 3),
    ]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for number, batch in enumerate(partial, start=1):
            step = state.step(batch, 0.01, 4, number)
            assert not step.bad
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("name", ["detection", "classification"])
def test_parts_of_an_odd_batch_have_one_shape(name: str) -> None:
    state = new_state(name)
    state.step(mock_batch(state._task, 3, CPU, 2), 0.01, 3, 0)
    graphs = counters["stats"]["unique_graphs"]
    state._microbatches.size = 3
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert not state.step(mock_batch(state._task, 4, CPU, 2), 0.01, 4, 1).bad
    assert counters["stats"]["unique_graphs"] == graphs


def test_growing_crops_compile_four_times() -> None:
    state = new_state(
        "classification", classification__epochs=18, classification__progressive_from_px=32,
        classification__image_size_px=192,
    )  # fmt: skip
    batch = mock_batch(state._task, 4, CPU, 2)
    graphs = []
    for epoch in range(18):
        batch.epoch = epoch
        state.step(batch, 0.01, 4, epoch)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[-1] == 4 * graphs[0]
