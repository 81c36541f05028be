"""A bad step changes nothing; a good one equals torch's optimizer and gradient scaler, and timm's average."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn

from pillsnap.train.step.batch_statistics import STATISTICS
from pillsnap.train.step.nonfinite import Buffers, LossScale, MovingAverage, clipped_step

GOOD, BAD = torch.tensor(1.0), torch.tensor(0.0)


def new_model() -> nn.Module:
    torch.manual_seed(3)
    layers = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 1), nn.Flatten(), nn.Linear(216, 2)
    )
    return layers.to(memory_format=torch.channels_last)


def gradients_of(model: nn.Module, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(4, 3, 8, 8, generator=generator).to(memory_format=torch.channels_last)
    model.zero_grad()
    (30 * model(images)).square().sum().backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("factor", [None, 1024.0])
def test_clipped_step_equals_the_plain_optimizer(factor: float | None) -> None:
    ours, theirs = new_model(), new_model()
    fused = torch.optim.AdamW(ours.parameters(), lr=1e-2, fused=True)
    plain = torch.optim.AdamW(theirs.parameters(), lr=1e-2, foreach=False)
    for seed in range(4):
        gradients = gradients_of(ours, seed)
        for gradient in gradients:
            gradient *= factor or 1.0
        norm, good = clipped_step(fused, gradients, 0.5, None if factor is None else torch.tensor(factor))
        gradients_of(theirs, seed)
        expected = nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        plain.step()
        assert good == 1 and expected > 5 and float(norm) == pytest.approx(float(expected), rel=1e-4)
    for first, second in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_gradient_changes_neither_weights_nor_optimizer(value: float) -> None:
    model = new_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    clipped_step(optimizer, gradients_of(model, 0), 0.5)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    gradients = gradients_of(model, 1)
    model.load_state_dict(before[0])  # the forward pass has moved the running statistics
    gradients[1][0] = value
    _, good = clipped_step(optimizer, gradients, 0.5)
    assert good == 0
    torch.testing.assert_close((model.state_dict(), optimizer.state_dict()["state"]), before, rtol=0, atol=0)
    assert optimizer.state_dict()["state"][0]["step"] == 1


def test_moving_average_equals_timm_s_and_skips_bad_steps() -> None:
    """Running statistics stay as they are: BatchStatistics estimates them."""
    model = new_model()
    statistics = {name: value.clone() for name, value in model.state_dict().items() if name.endswith(STATISTICS)}
    assert len(statistics) == 2
    options = {"decay": 0.9, "use_warmup": True, "warmup_gamma": 1.0, "warmup_power": 0.75}
    ours, theirs = MovingAverage(model, **options), ModelEmaV3(model, **options)
    ours.follow(model)
    for step in range(1, 6):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model(torch.randn(4, 3, 8, 8))
        ours.update_if(GOOD, step)
        theirs.update(model, step)
        expected = dict(theirs.module.state_dict()) | statistics
        torch.testing.assert_close(dict(ours.module.state_dict()), expected, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        model[0].weight += 1
    before = copy.deepcopy(ours.module.state_dict())
    ours.update_if(BAD, 6)
    torch.testing.assert_close(ours.module.state_dict(), before, rtol=0, atol=0)


def test_running_statistics_of_a_bad_step_are_restored() -> None:
    model = new_model()
    buffers = Buffers(model)
    before = copy.deepcopy(model.state_dict())
    buffers.keep()
    model(torch.full((4, 3, 8, 8), float("nan")))
    assert torch.isnan(model[1].running_mean).all() and model[1].num_batches_tracked == 1
    buffers.restore_unless(BAD)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    model(torch.randn(4, 3, 8, 8))
    moved = copy.deepcopy(model.state_dict())
    buffers.restore_unless(GOOD)
    torch.testing.assert_close(model.state_dict(), moved, rtol=0, atol=0)
    assert not torch.equal(moved["1.running_mean"], before["1.running_mean"])
    buffers.restore()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_loss_scale_equals_torch_s_gradient_scaler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pillsnap.train.step.nonfinite._GROW_AFTER", 3)
    scaler = torch.amp.GradScaler("cpu", growth_interval=3)
    ours = LossScale(torch.device("cpu"))
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    seen = []
    for bad in (0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0):
        weight.grad = torch.tensor([float("inf") if bad else 1.0])
        scaler.scale(torch.ones(()))
        scaler.step(optimizer)
        scaler.update()
        ours.update(BAD if bad else GOOD)
        seen.append(float(ours.factor))
        assert seen[-1] == scaler.get_scale()
    assert len(set(seen)) >= 3
    other = LossScale(torch.device("cpu"))
    other.load_state_dict(ours.state_dict())
    for good in (GOOD, GOOD):
        ours.update(good)
        other.update(good)
    assert other.factor == ours.factor == 2 * seen[-1]
    while not ours.exhausted:
        ours.update(BAD)
    assert ours.factor == 1
