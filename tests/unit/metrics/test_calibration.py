from __future__ import annotations

import numpy as np
import pytest
import torch

from pillsnap.metrics.calibration import TEMPERATURES, best_temperature, calibration_error, losses_by_temperature


def overconfident(num: int = 20_000, classes: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a calibrated classifier, times 2.5: the temperature to find."""
    generator = torch.Generator().manual_seed(0)
    calibrated = 1.5 * torch.randn(num, classes, generator=generator)
    labels = torch.multinomial(calibrated.softmax(1), 1, generator=generator)[:, 0]
    return 2.5 * calibrated, labels


def test_losses_are_the_cross_entropy_at_each_temperature() -> None:
    logits, labels = overconfident(5)
    losses = losses_by_temperature(logits, labels)
    assert losses.shape == (5, len(TEMPERATURES))
    for column in (0, 30, 60):
        expected = torch.nn.functional.cross_entropy(logits / TEMPERATURES[column], labels, reduction="none")
        torch.testing.assert_close(losses[:, column], expected)
    assert TEMPERATURES[30] == pytest.approx(1.0)


def test_best_temperature_is_found_and_reduces_the_error() -> None:
    logits, labels = overconfident()
    half = len(labels) // 2
    temperature = best_temperature(losses_by_temperature(logits[:half], labels[:half]).mean(0).numpy())
    assert temperature == pytest.approx(2.5, rel=0.03)
    held_out, truth = logits[half:], labels[half:].numpy()
    error = {}
    for t in (1.0, temperature):
        confidence, predicted = (held_out / t).softmax(1).max(1)
        error[t] = calibration_error(confidence.numpy(), predicted.numpy() == truth)["ece"]
    assert error[1.0] > 0.2
    assert error[temperature] < 0.015


def test_perfect_classifier_gets_the_lowest_temperature() -> None:
    logits = 5 * torch.eye(4)
    losses = losses_by_temperature(logits, torch.arange(4)).mean(0).numpy()
    assert best_temperature(losses) == TEMPERATURES[0]
    assert np.isfinite(losses).all()


def test_calibration_error_by_hand() -> None:
    # Bins of 1/15: 0.95 twice with one correct (gap 0.45), 0.55 once and correct (gap 0.45), 0.2 once and wrong (0.2).
    found = calibration_error(np.array([0.95, 0.95, 0.55, 0.2]), np.array([1, 0, 1, 0]))
    assert found["ece"] == pytest.approx((3 * 0.45 + 0.2) / 4)
    filled = {i: (found["count"][i], found["confidence"][i], found["accuracy"][i]) for i in (3, 8, 14)}
    assert filled == {3: (1, 0.2, 0.0), 8: (1, 0.55, 1.0), 14: (2, 0.95, 0.5)}
    assert sum(found["count"]) == 4 and found["confidence"][0] is found["accuracy"][0] is None
    assert calibration_error(np.ones(1), np.ones(1))["count"][14] == 1
