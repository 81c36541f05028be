from __future__ import annotations

import numpy as np
import pytest
import torch

from pillsnap.metrics.calibration import (
    NUM_FACTS,
    NUM_FOLDS,
    TEMPERATURES,
    best_temperature,
    calibration_error,
    cross_fitted_confidence,
    temperature_facts,
)


def overconfident(num: int = 20_000, classes: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a calibrated classifier, times 2.5: the temperature to find."""
    generator = torch.Generator().manual_seed(0)
    calibrated = 1.5 * torch.randn(num, classes, generator=generator)
    labels = torch.multinomial(calibrated.softmax(1), 1, generator=generator)[:, 0]
    return 2.5 * calibrated, labels


def facts_of(logits: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    return temperature_facts(logits, labels).numpy()


def separable(num: int, classes: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a classifier that makes no mistake."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (num,), generator=generator)
    logits = torch.randn(num, classes, generator=generator)
    return logits.scatter_add(1, labels[:, None], torch.full((num, 1), 9.0)), labels


def test_facts_are_the_cross_entropy_at_each_temperature_and_two_distances() -> None:
    logits, labels = overconfident(5)
    facts = temperature_facts(logits, labels)
    assert facts.shape == (5, NUM_FACTS) == (5, len(TEMPERATURES) + 2)
    for column in (0, 30, 60):
        expected = torch.nn.functional.cross_entropy(logits / TEMPERATURES[column], labels, reduction="none")
        torch.testing.assert_close(facts[:, column], expected)
    assert TEMPERATURES[30] == pytest.approx(1.0)
    for row, label, (ahead, behind) in zip(logits, labels.tolist(), facts[:, -2:].tolist(), strict=True):
        others = torch.cat([row[:label], row[label + 1 :]])
        assert ahead == pytest.approx(float(row[label] - others.mean()), abs=1e-5)
        assert behind == pytest.approx(float(row.max() - row[label]), abs=1e-5)


def test_best_temperature_is_found_and_reduces_the_error() -> None:
    logits, labels = overconfident()
    half = len(labels) // 2
    temperature = best_temperature(facts_of(logits[:half], labels[:half]))
    assert temperature == pytest.approx(2.5, rel=0.03)
    held_out, truth = logits[half:], labels[half:].numpy()
    error = {}
    for t in (1.0, temperature):
        confidence, predicted = (held_out / t).softmax(1).max(1)
        error[t] = calibration_error(confidence.numpy(), predicted.numpy() == truth)["ece"]
    assert error[1.0] > 0.2
    assert error[temperature] < 0.015


@pytest.mark.parametrize("num", [4, 24, 101, 2000])
def test_without_a_mistake_confidence_stays_as_low_as_the_number_of_crops_allows(num: int) -> None:
    """About 1 - 1 / (n + 2) on average, the rule of succession; least likelihood loss alone gives temperature 0.1."""
    logits, labels = separable(num)
    temperature = best_temperature(facts_of(logits, labels))
    assert 2 * TEMPERATURES[0] < temperature < TEMPERATURES[-1] / 2
    confidence = (logits / temperature).softmax(1).amax(1)
    assert 1 - float(confidence.mean()) == pytest.approx(1 / (num + 2), rel=0.3)


def test_rows_that_are_not_finite_do_not_fit_a_temperature() -> None:
    logits, labels = overconfident(2000)
    expected = best_temperature(facts_of(logits[:1000], labels[:1000]))
    logits[1000:, 3] = float("nan")
    logits[1500:, 3] = float("inf")
    facts = facts_of(logits, labels)
    assert best_temperature(facts) == pytest.approx(expected)
    assert best_temperature(facts[1000:]) == best_temperature(facts[:0]) == 1.0


def test_cross_fitted_confidence_is_of_crops_that_did_not_fit_it() -> None:
    """Each fold by hand, through softmax at the temperature of the other folds."""
    logits, labels = overconfident(200)
    groups = np.array([f"group-{number // 4:03}" for number in range(200)])
    facts = facts_of(logits, labels)
    found = cross_fitted_confidence(facts, groups)
    fold = np.arange(200) // 4 % NUM_FOLDS
    temperatures = set()
    for number in range(NUM_FOLDS):
        temperature = best_temperature(facts[fold != number])
        temperatures.add(temperature)
        expected = (logits[fold == number] / temperature).softmax(1).amax(1)
        np.testing.assert_allclose(found[fold == number], expected, atol=2e-3)
    assert len(temperatures) == NUM_FOLDS
    one_group = cross_fitted_confidence(facts, np.array(["same"] * 200))  # nothing else fits: temperature 1
    np.testing.assert_allclose(one_group, logits.softmax(1).amax(1), atol=1e-5)


def test_calibration_error_by_hand() -> None:
    # Bins of 1/15: 0.95 twice with one correct (gap 0.45), 0.55 once and correct (gap 0.45), 0.2 once and wrong (0.2).
    found = calibration_error(np.array([0.95, 0.95, 0.55, 0.2]), np.array([1, 0, 1, 0]))
    assert found["ece"] == pytest.approx((3 * 0.45 + 0.2) / 4)
    filled = {i: (found["count"][i], found["confidence"][i], found["accuracy"][i]) for i in (3, 8, 14)}
    assert filled == {3: (1, 0.2, 0.0), 8: (1, 0.55, 1.0), 14: (2, 0.95, 0.5)}
    assert sum(found["count"]) == 4 and found["confidence"][0] is found["accuracy"][0] is None
    assert calibration_error(np.ones(1), np.ones(1))["count"][14] == 1
