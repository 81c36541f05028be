"""Likeness is the relative Mahalanobis distance, shrunk as suits the number of crops."""

from __future__ import annotations

import numpy as np
import pytest

from pillsnap.metrics.likeness import SHRINKAGES, best_shrinkage, fit_likeness
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


@pytest.mark.parametrize(("each", "few"), [(200, False), (6, True)])
def test_few_crops_in_many_dimensions_are_shrunk_more(each: int, few: bool) -> None:
    """Classes differ in 8 of 96 directions, which are narrower than the others within a class."""
    rng = np.random.default_rng(3)
    labels = np.repeat(np.arange(24), each)
    scale = np.where(np.arange(96) < 8, 0.5, 1.0)
    centres = rng.normal(size=(24, 96)) * np.where(np.arange(96) < 8, 1.0, 0.0)
    features = centres[labels] + rng.normal(size=(len(labels), 96)) * scale
    chosen = best_shrinkage(features, labels, np.arange(len(labels)))
    assert (chosen > SHRINKAGES[1]) == few
    assert chosen == best_shrinkage(features, labels, np.arange(len(labels)))


def test_groups_play_together_and_too_few_change_nothing() -> None:
    features, labels = crops()
    assert best_shrinkage(features, labels, np.zeros(len(labels))) == SHRINKAGES[0]
    assert best_shrinkage(features[:80], labels[:80], np.arange(80)) == SHRINKAGES[0]  # two classes
