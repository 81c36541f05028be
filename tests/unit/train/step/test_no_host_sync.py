"""A training step contains no host sync.

Without a GPU, syncs are detected as operations whose result the host needs: values read from a tensor, shapes that
depend on values, and tensors made from host values. `python -m benchmarks.gpu` checks the same on a GPU with
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
from pillsnap.train.step.collectives import WorkerGroup
from pillsnap.train.step.microbatch import MicrobatchRunner
from pillsnap.train.step.training_state import TrainingState

CPU = torch.device("cpu")
SMALL = {
    "detection.image_size_px": 64, "classification.image_size_px": 32, "train.amp": "off", "train.compile": "off",
}  # fmt: skip
SYNCING = (
    "aten._local_scalar_dense", "aten.nonzero", "aten._unique", "aten.unique", "aten.masked_select", "aten.equal",
    "aten.is_nonzero", "aten.lift_fresh", "aten.repeat_interleave.Tensor", "aten.bincount",
)  # fmt: skip


class HostSync(AssertionError):
    """On a GPU, this operation is a host sync."""


READS = (torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy)


class ForbidReads(TorchFunctionMode):
    """Forbids copies to the host; on the CPU, the dispatcher does not see them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            raise HostSync(str(func))
        return func(*args, **(kwargs or {}))


class ForbidSyncs(TorchDispatchMode):
    """Forbids operations that need a tensor's values on the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith(SYNCING):
            raise HostSync(name)
        if name.startswith(("aten.index.", "aten.index_put")):
            for index in args[1]:
                if index is not None and index.dtype in (torch.bool, torch.uint8):
                    raise HostSync(f"{name} with a mask")
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)  # faster for models this small


@pytest.fixture(autouse=True)
def criterion_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from pillsnap.models import detector

    gpu = torch.device("cuda", 0)
    choose = detector._criterion
    monkeypatch.setattr(detector, "_criterion", lambda model, device, marked: choose(model, gpu, marked))


def new_state(name: str, **changes: object) -> TrainingState:
    settings = load_settings("demo", SMALL | {key.replace("__", "."): value for key, value in changes.items()})
    task = make_task(name, settings, ["K-1", "K-2", "K-3"])
    group = WorkerGroup(CPU)
    return TrainingState(task, settings.train, CPU, group, MicrobatchRunner(task.name, 4, group, None, print), None)


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
def test_step_has_no_host_sync(name: str, changes: dict[str, object]) -> None:
    state = new_state(name, **changes)
    batch = mock_batch(state._task, 4, CPU, 3)
    state.step(batch, 0.01, 4, 0)  # initialises caches
    before = {key: value.clone() for key, value in state.model.state_dict().items()}
    with ForbidReads(), ForbidSyncs():
        step = state.step(batch, 0.01, 4, 1)
    assert not step.bad
    moved = sum(not torch.equal(before[key], value) for key, value in state.model.state_dict().items())
    assert moved > 0.9 * len(before)


def test_step_of_a_partial_batch_has_no_host_sync() -> None:
    state = new_state("classification")
    batch = mock_batch(state._task, 4, CPU, 3)
    batch.targets["valid"][3:] = False
    batch.index[3:] = -1
    batch.num_valid = 3
    state._microbatches.size = 2
    state.step(batch, 0.01, 3, 0)
    with ForbidReads(), ForbidSyncs():
        parts = list(state._microbatches.parts(batch))
        state.step(batch, 0.01, 3, 1)
    assert [part.num_valid for part in parts] == [2, 1]


@pytest.mark.parametrize(
    "operation",
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
def test_the_check_detects_host_syncs(operation: Any) -> None:
    values = torch.tensor([-1.0, 0.5, 2.0])
    with pytest.raises(HostSync), ForbidReads(), ForbidSyncs():
        operation(values)
