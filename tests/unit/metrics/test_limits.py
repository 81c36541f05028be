"""Likeness is the relative Mahalanobis distance; limits survive their file; answers name their limit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pillsnap.errors import UserError
from pillsnap.metrics.limits import ENROLLED, LIMITS_NAME, NOT_EVALUATED, answer_of, fit_likeness, read_limits
from pillsnap.metrics.selective import auroc


def crops(num_classes: int = 12, each: int = 40, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features whose classes differ in 4 of 16 directions; the others are as wide for all."""
    rng = np.random.default_rng(seed)
    centres = np.zeros((num_classes, 16))
    centres[:, :4] = np.random.default_rng(9).normal(size=(num_classes, 4)) * 3
    labels = np.repeat(np.arange(num_classes), each)
    scale = np.where(np.arange(16) < 4, 0.5, 5.0)
    return centres[labels] + rng.normal(size=(len(labels), 16)) * scale, labels


def test_likeness_is_the_relative_mahalanobis_distance() -> None:
    features, labels = crops()
    limits = fit_likeness("m", features, labels)
    means = np.stack([features[labels == label].mean(0) for label in range(12)])
    new = np.random.default_rng(1).normal(size=(5, 16)) * 3

    def distances(deviations: np.ndarray, spread: np.ndarray) -> np.ndarray:
        covariance = spread.T @ spread / len(spread)
        covariance += 0.01 * np.trace(covariance) / 16 * np.eye(16)
        return np.einsum("...i,ij,...j->...", deviations, np.linalg.inv(covariance), deviations)

    nearest = distances(new[:, None] - means, features - means[labels]).min(1)
    overall = distances(new - features.mean(0), features - features.mean(0))
    np.testing.assert_allclose(limits.likeness(new), overall - nearest, rtol=1e-4, atol=1e-3)


def test_classes_not_trained_are_less_alike() -> None:
    features, labels = crops()
    known = labels < 9
    limits = fit_likeness("m", features[known], labels[known])
    held_out, truth = crops(seed=5)
    found = limits.likeness(held_out)
    assert auroc(found[truth < 9], found[truth >= 9]) > 0.95
    # One crop per class leaves no covariance within classes: a number all the same.
    assert np.isfinite(fit_likeness("m", features[::40], labels[::40]).likeness(held_out)).all()


def test_limits_survive_their_file(tmp_path: Path) -> None:
    assert read_limits(tmp_path) is None
    features, labels = crops()
    limits = replace(fit_likeness("abc", features, labels), max_wrong=0.01, known=-3.5)
    (tmp_path / LIMITS_NAME).write_bytes(limits.to_bytes())
    found = read_limits(tmp_path)
    assert found is not None
    assert (found.model, found.max_wrong, found.confidence, found.known) == ("abc", 0.01, np.inf, -3.5)
    np.testing.assert_array_equal(found.likeness(features), limits.likeness(features))
    (tmp_path / LIMITS_NAME).write_bytes(limits.to_bytes()[:-200])
    with pytest.raises(UserError, match=r"limits.npz is damaged .*: evaluate the run again"):
        read_limits(tmp_path)


def test_answers_name_their_limit() -> None:
    limits = replace(fit_likeness("m", *crops()), max_wrong=0.01, confidence=0.9, known=-5.0)
    assert limits.answer(0.9, -5.0) == {"answer": "code", "reason": None}
    assert limits.answer(0.8999, 0.0) == {
        "answer": "unsure",
        "reason": "confidence 0.8999 is below 0.9000, the limit for at most 1 % wrong codes",
    }
    assert limits.answer(1.0, -5.1) == {"answer": "unknown", "reason": "likeness -5.1 is below -5.0"}
    assert limits.answer(0.0, float("nan"))["answer"] == "unknown"  # logits that are not finite
    never = replace(limits, confidence=np.inf).answer(1.0, 0.0)
    assert never["answer"] == "unsure" and "no confidence is known" in never["reason"]


def test_without_limits_or_for_an_enrolled_drug_the_answer_is_unsure() -> None:
    limits = replace(fit_likeness("m", *crops()), max_wrong=0.01, confidence=0.9, known=-5.0)
    assert answer_of(None, 1.0, 0.0) == answer_of(limits, 1.0, None) == NOT_EVALUATED
    assert answer_of(limits, 1.0, 0.0) == {"answer": "code", "reason": None}
    assert answer_of(limits, 1.0, -9.0, enrolled=True) == ENROLLED
    assert ENROLLED["answer"] == NOT_EVALUATED["answer"] == "unsure"
