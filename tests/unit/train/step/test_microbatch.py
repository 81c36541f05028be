"""A step that is computed in parts has the loss and the gradient of the whole batch, whatever the loss divides by."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pillsnap.config import load_settings
from pillsnap.data.loader import DeviceBatch
from pillsnap.planner.measure import mock_batch
from pillsnap.tasks.registry import make_task
from pillsnap.train.step import training_state
from pillsnap.train.step.collectives import WorkerGroup
from pillsnap.train.step.microbatch import MicrobatchRunner
from pillsnap.train.step.training_state import TrainingState

CPU = torch.device("cpu")
ROWS = 6


def uneven_batch(state: TrainingState) -> DeviceBatch:
    """Photos with 3, 0, 2, 0, 1 and 1 pills; the fourth could not be read, the last row has no sample."""
    batch = mock_batch(state._task, ROWS, CPU)
    batch.images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, batch.images.shape, dtype=np.uint8))
    boxes = [[8.0, 8, 20, 24], [36, 4, 18, 18], [10, 40, 40, 12]]
    batch.targets["boxes"] = torch.tensor(boxes).repeat(ROWS, 1, 1)
    batch.targets["num_boxes"] = torch.tensor([3, 0, 2, 0, 1, 1], dtype=batch.targets["num_boxes"].dtype)
    batch.targets["valid"][3] = batch.targets["valid"][5] = False
    batch.index[5], batch.num_valid = -1, ROWS - 2
    return batch


def one_step(model: str, rows: int) -> tuple[dict[str, float], list[torch.Tensor]]:
    """Losses and gradients of one step in parts of `rows`, with constant statistics in batch normalisation."""
    settings = load_settings("demo", {
        "detection.model": model, "detection.weights": "random", "detection.image_size_px": 64, "train.amp": "off",
    })  # fmt: skip
    task, group, gradients = make_task("detection", settings, []), WorkerGroup(CPU), []
    parts = MicrobatchRunner(task.name, ROWS, group, None, print)
    parts.size = rows
    state = TrainingState(task, settings.train, CPU, group, parts, None)
    for layer in state.model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.eval()
    step = training_state.clipped_step

    def recorded(optimizer: torch.optim.Optimizer, found: list[torch.Tensor], *options: object) -> object:
        gradients.extend(gradient.clone() for gradient in found)
        return step(optimizer, found, *options)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_state, "clipped_step", recorded)
        losses = state.step(uneven_batch(state), 1e-3, ROWS - 2, 0).losses
    return {name: float(loss) for name, loss in losses.items()}, gradients


@pytest.mark.parametrize("model", ["yolo11n", "yolo26n"])
def test_detection_step_in_parts_equals_the_whole(model: str) -> None:
    """The loss divides by the assigned scores of the batch, for each of an end-to-end model's two heads."""
    losses, gradients = one_step(model, ROWS)
    for rows in (4, 1):
        split_losses, split_gradients = one_step(model, rows)
        assert split_losses == pytest.approx(losses, rel=1e-5)
        for split, whole in zip(split_gradients, gradients, strict=True):
            assert float((split - whole).norm()) <= 1e-4 * float(whole.norm()) + 1e-6


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_parts_have_one_shape_and_every_sample_once(rows: int, size: int) -> None:
    settings = load_settings("demo", {"classification.image_size_px": 32})
    task = make_task("classification", settings, ["K-1", "K-2"])
    batch = mock_batch(task, rows, CPU)
    batch.index[:] = np.arange(rows)
    batch.targets["label"] = torch.arange(rows)
    microbatches = MicrobatchRunner(task.name, rows, WorkerGroup(CPU), None, print)
    microbatches.size = min(size, rows)
    parts = list(microbatches.parts(batch))
    assert {len(part.images) for part in parts} == {min(size, rows)}
    assert [int(i) for part in parts for i in part.index if i >= 0] == list(range(rows))
    valid = [part.targets["valid"] for part in parts]
    labels = [label for part, rows in zip(parts, valid, strict=True) for label in part.targets["label"][rows].tolist()]
    assert labels == list(range(rows))
    assert [part.num_valid for part in parts] == [int(rows.sum()) for rows in valid]
    assert batch.targets["valid"].all()
