"""The stated risk is kept as often as stated, and coverage is what the data allow."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pillsnap.metrics.selective import (
    CONFIDENCE,
    NEVER,
    auroc,
    binomial_tail,
    choose_threshold,
    fewest_answers,
    lower_limit,
    risk_coverage,
    upper_bound,
)


def crops(num: int, seed: int, group_size: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Confidence, wrong, group: an answer of confidence c is wrong with the probability 0.3 (1 - c); one draw a group,
    the worst case of near-identical photos.
    """
    rng = np.random.default_rng(seed)
    confidence = np.repeat(rng.random(num // group_size), group_size)
    wrong = np.repeat(rng.random(num // group_size), group_size) < 0.3 * (1 - confidence)
    return confidence, wrong, np.repeat(np.arange(num // group_size), group_size)


@pytest.mark.parametrize(
    ("num_groups", "group_size", "coverage"), [(2000, 1, 0.14), (2000, 5, 0.14), (20_000, 1, 0.28)]
)
def test_risk_is_kept_as_often_as_stated(num_groups: int, group_size: int, coverage: float) -> None:
    """Answers from t on are wrong with the probability 0.15 (1 - t): at most 5 % from 2/3 on, a third of the crops."""
    max_wrong, trials = 0.05, 300
    found = [choose_threshold(*crops(num_groups * group_size, seed, group_size), max_wrong) for seed in range(trials)]
    answered = 1 - np.minimum([each.confidence for each in found], 1.0)
    broken = np.mean(0.15 * answered > max_wrong)
    assert broken <= 1 - CONFIDENCE
    assert coverage < answered.mean() < 1 / 3


def test_photos_of_a_group_count_as_one() -> None:
    confidence, wrong, groups = np.ones(1000), np.zeros(1000, bool), np.arange(1000) % 200
    assert choose_threshold(confidence, wrong, groups, 0.01).confidence == NEVER
    assert choose_threshold(confidence, wrong, np.arange(1000), 0.01).confidence == 1.0


def test_answers_that_a_risk_needs() -> None:
    assert fewest_answers(0.01) == 299 and fewest_answers(0.05) == 59
    for num, expected in ((298, NEVER), (299, 0.5)):
        found = choose_threshold(np.linspace(0.5, 1, num), np.zeros(num, bool), np.arange(num), 0.01)
        assert found.confidence == expected
    found = choose_threshold(np.linspace(0.5, 1, 299), np.arange(299) == 7, np.arange(299), 0.01)
    assert (found.confidence, found.num_tested, found.upper_bound) == (NEVER, 0, None)
    assert choose_threshold(np.zeros(0), np.zeros(0, bool), np.zeros(0), 0.01).confidence == NEVER


def test_wrong_answers_of_high_confidence_do_not_end_the_search() -> None:
    """Two wrong labels among the most confident of 3,000 crops forbid the first levels, not the later ones."""
    wrong = np.zeros(3000, bool)
    wrong[[2990, 2995]] = True
    wrong[:600] = True
    found = choose_threshold(np.linspace(0, 1, 3000), wrong, np.arange(3000), 0.01)
    assert found.confidence == pytest.approx(0.2, abs=0.03) and found.confidence > 0.195
    assert found.upper_bound is not None and 2 / 2400 < found.upper_bound <= 0.01


def test_equal_confidences_are_answered_together() -> None:
    confidence = np.concatenate([np.full(500, 0.9), np.full(500, 0.4)])
    wrong = np.arange(1000) >= 500
    found = choose_threshold(confidence, wrong, np.arange(1000), 0.01)
    assert (found.confidence, found.num_tested) == (0.9, 500)


def test_binomial_tail_and_bound() -> None:
    expected = sum(math.comb(50, i) * 0.1**i * 0.9 ** (50 - i) for i in range(4))
    assert binomial_tail(3, 50, 0.1) == pytest.approx(expected, rel=1e-12)
    assert upper_bound(0, 299) == pytest.approx(1 - 0.05 ** (1 / 299), rel=1e-9)
    assert upper_bound(1, 473) == pytest.approx(0.0100, abs=1e-4)
    assert upper_bound(5, 5) == 1.0


def test_risk_coverage_curve_and_its_area() -> None:
    found = risk_coverage(np.array([0.9, 0.8, 0.7, 0.6]), np.array([False, False, True, True]))
    assert found["aurc"] == pytest.approx((0 + 0 + 1 / 3 + 2 / 4) / 4)
    assert (found["coverage"][9], found["wrong"][9]) == (0.5, 0.0)
    assert (found["coverage"][-1], found["wrong"][-1]) == (1.0, 0.5)


def test_auroc_counts_pairs() -> None:
    rng = np.random.default_rng(0)
    higher, lower = rng.integers(0, 9, 50) + 2, rng.integers(0, 9, 70)
    pairs = higher[:, None] - lower[None]
    assert auroc(higher, lower) == pytest.approx(((pairs > 0) + 0.5 * (pairs == 0)).mean())
    assert auroc(np.array([2.0]), np.array([1.0])) == 1.0


def test_lower_limit_accepts_the_stated_share() -> None:
    rng = np.random.default_rng(0)
    accepted = [rng.normal() >= lower_limit(rng.normal(size=199), 0.99) for _ in range(20_000)]
    assert np.mean(accepted) == pytest.approx(0.99, abs=0.002)
    assert lower_limit(np.arange(98.0), 0.99) == -math.inf
    assert lower_limit(np.arange(99.0), 0.99) == 0.0
