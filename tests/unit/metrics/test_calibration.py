from __future__ import annotations

import numpy as np
import pytest
import torch

from pillsnap.metrics.calibration import TEMPERATURES, best_temperature, losses_by_temperature
from pillsnap.metrics.classification import calibration


def overconfident(num: int = 20_000, classes: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a classifier that is right as often as its softmax says, times 2.5: the temperature to find."""
    generator = torch.Generator().manual_seed(0)
    honest = 1.5 * torch.randn(num, classes, generator=generator)
    labels = torch.multinomial(honest.softmax(1), 1, generator=generator)[:, 0]
    return 2.5 * honest, labels


def test_losses_are_the_cross_entropy_at_each_temperature() -> None:
    logits, labels = overconfident(5)
    losses = losses_by_temperature(logits, labels)
    assert losses.shape == (5, len(TEMPERATURES))
    for column in (0, 30, 60):
        expected = torch.nn.functional.cross_entropy(logits / TEMPERATURES[column], labels, reduction="none")
        torch.testing.assert_close(losses[:, column], expected)
    assert TEMPERATURES[30] == pytest.approx(1.0)


def test_the_temperature_is_found_and_mends_the_calibration() -> None:
    logits, labels = overconfident()
    half = len(labels) // 2
    temperature = best_temperature(losses_by_temperature(logits[:half], labels[:half]).mean(0).numpy())
    assert temperature == pytest.approx(2.5, rel=0.03)
    held_out, truth = logits[half:], labels[half:].numpy()
    error = {}
    for t in (1.0, temperature):
        confidence, predicted = (held_out / t).softmax(1).max(1)
        error[t] = calibration(confidence.numpy(), predicted.numpy() == truth)["ece"]
    assert error[1.0] > 0.2
    assert error[temperature] < 0.015


def test_a_classifier_that_is_always_right_gets_the_lowest_temperature() -> None:
    logits = 5 * torch.eye(4)
    losses = losses_by_temperature(logits, torch.arange(4)).mean(0).numpy()
    assert best_temperature(losses) == TEMPERATURES[0]
    assert np.isfinite(losses).all()
