"""Running statistics of the averaged model: those of its own weights, whatever the learning rate."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from pillsnap.config import load_settings
from pillsnap.data.loader import DeviceBatch
from pillsnap.planner.measure import mock_batch
from pillsnap.tasks.registry import make_task
from pillsnap.train.step.collectives import WorkerGroup
from pillsnap.train.step.microbatch import MicrobatchRunner
from pillsnap.train.step.training_state import TrainingState

CPU = torch.device("cpu")


def new_state(name: str, batch_size: int, part: int | None = None, **changes: object) -> TrainingState:
    given = {"classification.image_size_px": 32, "detection.image_size_px": 64, "train.amp": "off"}
    settings = load_settings("demo", given | {key.replace("__", "."): value for key, value in changes.items()})
    group = WorkerGroup(CPU)
    microbatches = MicrobatchRunner(name, batch_size, group, None, print)
    microbatches.size = part or batch_size
    return TrainingState(make_task(name, settings, ["K-1", "K-2"]), settings.train, CPU, group, microbatches, None)


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def statistics(model: nn.Module) -> torch.Tensor:
    return torch.cat([torch.cat([norm.running_mean, norm.running_var]) for norm in norms(model)])


def of_batch(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Statistics of one batch, without dropout."""
    model = copy.deepcopy(model)
    for norm in norms(model):
        norm.momentum = 1.0
        norm.train()
    model(images)
    return statistics(model)


@pytest.mark.parametrize("part", [4, 2])
def test_statistics_are_means_over_the_last_ten_batches(part: int) -> None:
    state = new_state("classification", 4, part, classification__drop_rate=0.5)
    expected = []
    for step in range(13):
        batch = mock_batch(state._task, 4, CPU, 2)
        state.step(batch, 0.02, 4, step)
        random_state = torch.get_rng_state()
        state.prepare_validation(batch, step, num_steps=13)
        assert torch.equal(random_state, torch.get_rng_state())
        with torch.no_grad():
            inputs = state._task._inputs(state.ema.module, batch.images, 32)
            expected.append(torch.stack([of_batch(state.ema.module, rows) for rows in inputs.split(part)]).mean(0))
        assert not any(module.training for module in state.ema.module.modules())
        if step == 2:  # none of the last ten
            initial = torch.cat([torch.cat([torch.zeros_like(n.bias), torch.ones_like(n.bias)])
                                 for n in norms(state.ema.module)])  # fmt: skip
            assert torch.equal(statistics(state.ema.module), initial)
    torch.testing.assert_close(statistics(state.ema.module), torch.stack(expected[3:]).mean(0))


def test_model_without_batch_normalisation_needs_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(*_: object) -> None:
        raise AssertionError("a forward pass for nothing")

    sizes = {"classification__model": "test_vit", "classification__image_size_px": 160}
    state = new_state("classification", 2, **sizes)
    monkeypatch.setattr(type(state._task), "forward", forward)
    state.prepare_validation(mock_batch(state._task, 2, CPU, 2), 0, num_steps=1)


def squares(rng: torch.Generator) -> DeviceBatch:
    """Eight frames with a bright square each."""
    images, boxes = torch.randint(100, 150, (8, 64, 64, 3), generator=rng).byte(), torch.zeros(8, 4, 4)
    for image, box in zip(images, boxes, strict=True):
        x, y, side = torch.randint(4, 30, (3,), generator=rng).tolist()
        side = 14 + side // 2
        box[0] = torch.tensor([x, y, side, side])
        image[y : y + side, x : x + side] += 100
    targets = {"boxes": boxes, "num_boxes": torch.ones(8, dtype=torch.long), "valid": torch.ones(8, dtype=torch.bool)}
    return DeviceBatch(0, True, 0, images, targets, np.arange(8), 8)


def test_detector_finds_what_it_has_learned_at_a_high_learning_rate() -> None:
    """60 steps at a constant rate, the average of the stages' presets: averaged statistics gave a loss of 2 or of 100,
    and no box, from one step to the next.
    """
    state, rng = new_state("detection", 8, train__ema_warmup_steps=0.5), torch.Generator().manual_seed(1)
    for step in range(60):
        batch = squares(rng)
        state.step(batch, 2e-3, 8, step)
        state.prepare_validation(batch, step, num_steps=60)
    task, model = state._task, state.ema.module
    unseen = [squares(rng) for _ in range(4)]
    metrics = task.score([fact for batch in unseen for fact in task.validate(model, batch)])
    assert metrics["map50"] > 0.5
