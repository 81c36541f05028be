"""A training step asks the device nothing: on a GPU, each question would let it run dry.

Without a GPU the questions are seen as operations whose result the host needs: numbers read off a tensor, shapes that
depend on values, and tensors made from the host's numbers. `python -m benchmarks.gpu` checks the same on a GPU, with
torch.cuda.set_sync_debug_mode("error").
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pillsnap.config import load_settings
from pillsnap.planner.measure import mock_batch
from pillsnap.tasks.registry import make_task
from pillsnap.train.collectives import Peers
from pillsnap.train.microbatch import MicroBatches
from pillsnap.train.state import TrainingState

CPU = torch.device("cpu")
SMALL = {
    "detection.image_size_px": 64, "classification.image_size_px": 32, "train.amp": "off", "train.compile": "off",
}  # fmt: skip
ASKING = (
    "aten._local_scalar_dense", "aten.nonzero", "aten._unique", "aten.unique", "aten.masked_select", "aten.equal",
    "aten.is_nonzero", "aten.lift_fresh", "aten.repeat_interleave.Tensor", "aten.bincount",
)  # fmt: skip


class Waits(AssertionError):
    """The host would wait for the device here."""


READING = (torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy)


class NoReading(TorchFunctionMode):
    """Refuses what copies a tensor to the host; between CPU and CPU that is no operation."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READING:
            raise Waits(str(func))
        return func(*args, **(kwargs or {}))


class NoWaiting(TorchDispatchMode):
    """Refuses operations that need a tensor's values on the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith(ASKING):
            raise Waits(name)
        if name.startswith(("aten.index.", "aten.index_put")):
            for index in args[1]:
                if index is not None and index.dtype in (torch.bool, torch.uint8):
                    raise Waits(f"{name} with a mask")
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)  # models this small gain nothing from more


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from pillsnap.models import detector

    gpu = torch.device("cuda", 0)
    choose = detector._criterion
    monkeypatch.setattr(detector, "_criterion", lambda model, device, marked: choose(model, gpu, marked))


def new_state(name: str, **changes: object) -> TrainingState:
    settings = load_settings("demo", SMALL | {key.replace("__", "."): value for key, value in changes.items()})
    task = make_task(name, settings, ["K-1", "K-2", "K-3"])
    peers = Peers(CPU)
    return TrainingState(task, settings.train, CPU, peers, MicroBatches(task.name, 4, peers, None, print), None)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("classification", {}),
        ("classification", {"train__amp": "float16"}),
        ("detection", {}),
        ("detection", {"detection__model": "yolo26n"}),
        (
            "classification",
            {
                "classification__layer_decay": 0.8,
                "classification__image_size_px": 64,
                "classification__progressive_from_px": 32,
            },
        ),
    ],
)
def test_a_step_asks_the_device_nothing(name: str, changes: dict[str, object]) -> None:
    state = new_state(name, **changes)
    batch = mock_batch(state._task, 4, CPU, 3)
    state.step(batch, 0.01, 4, 0)  # the first makes what is made once
    before = {key: value.clone() for key, value in state.model.state_dict().items()}
    with NoReading(), NoWaiting():
        step = state.step(batch, 0.01, 4, 1)
    assert not step.bad
    moved = sum(not torch.equal(before[key], value) for key, value in state.model.state_dict().items())
    assert moved > 0.9 * len(before)


def test_a_batch_that_is_not_full_asks_nothing_either() -> None:
    state = new_state("classification")
    batch = mock_batch(state._task, 4, CPU, 3)
    batch.targets["valid"][3:] = False
    batch.index[3:] = -1
    batch.num_valid = 3
    state._memory.size = 2
    state.step(batch, 0.01, 3, 0)
    with NoReading(), NoWaiting():
        parts = list(state._memory.parts(batch))
        state.step(batch, 0.01, 3, 1)
    assert [part.num_valid for part in parts] == [2, 1]


@pytest.mark.parametrize(
    "question",
    [
        lambda x: float(x[0]),
        lambda x: bool(x.sum() > 0),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.unique(),
        lambda x: x * torch.tensor([1.0, 2.0, 3.0]),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.index_put((x > 0,), torch.zeros(())),
    ],
)
def test_the_check_notices_what_would_wait(question: Any) -> None:
    values = torch.tensor([-1.0, 0.5, 2.0])
    with pytest.raises(Waits), NoReading(), NoWaiting():
        question(values)
