"""Fits the likeness of `Limits` to crops of training photos: features (n, d) -> two whitenings and the class means.

How far the covariances are drawn towards multiples of the identity decides much where crops are few (1,100 in 1,280
dimensions), and the best amount differs: trained classes play unknown ones to find it, and unknown pills take no part.
"""

from __future__ import annotations

import numpy as np

from pillsnap.metrics.limits import Limits
from pillsnap.metrics.selective import auroc

SHRINKAGES = (0.01, 0.1, 0.5, 2.0, 10.0)
"""Added to each variance, as shares of the mean variance. The first one where too few classes or crops can play."""
NUM_ROUNDS = 3
MAX_PLAYING = 2_000
_ALIKE = 0.005
"""Differences of the AUROC that tell nothing: the classes that play unknown were trained."""


class _Statistics:
    """Of crops (n, d) of the classes `labels` (n,)."""

    def __init__(self, features: np.ndarray, labels: np.ndarray) -> None:
        _, index, counts = np.unique(labels, return_inverse=True, return_counts=True)
        self._middle = features.mean(0)
        deviations = features - self._middle
        means = np.zeros((len(counts), features.shape[1]), np.float32)
        np.add.at(means, index, deviations)
        self._means = means / counts[:, None]
        self._overall, self._within = (_eigen(each) for each in (deviations, deviations - self._means[index]))

    def limits(self, model: str, shrinkage: float) -> Limits:
        overall, within = (_whitening(*each, shrinkage) for each in (self._overall, self._within))
        return Limits(model, 0.0, np.inf, -np.inf, self._middle, overall, within, self._means @ within)


def fit_likeness(model: str, features: np.ndarray, labels: np.ndarray, groups: np.ndarray | None = None) -> Limits:
    """Limits whose likeness is fitted to `features` (n, d) of crops of the classes `labels` (n,); no other limit. Crops
    of one of the photo `groups` (n,) are nearly identical; by default none are.
    """
    features = features.astype(np.float32)
    shrinkage = best_shrinkage(features, labels, np.arange(len(labels)) if groups is None else groups)
    return _Statistics(features, labels).limits(model, shrinkage)


def best_shrinkage(features: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> float:
    """The least of SHRINKAGES that tells known classes from unknown ones as well as any (AUROC, mean of NUM_ROUNDS): in
    each round a third of the classes plays unknown, and of the others a quarter of the groups plays new crops.
    """
    classes = np.unique(labels)
    rng = np.random.default_rng(0)
    part = rng.permutation(len(classes)) % NUM_ROUNDS
    plays_new = rng.random(len(np.unique(groups)))[np.unique(groups, return_inverse=True)[1]] < 0.25
    scores = np.zeros(len(SHRINKAGES))
    for number in range(NUM_ROUNDS):
        unknown = np.isin(labels, classes[part == number])
        fitted = ~unknown & ~plays_new
        known = ~unknown & plays_new & np.isin(labels, labels[fitted])
        played = [rng.permutation(np.flatnonzero(each))[:MAX_PLAYING] for each in (known, unknown & plays_new)]
        if not min(map(len, played)):
            return SHRINKAGES[0]
        statistics = _Statistics(features[fitted], labels[fitted])
        for index, shrinkage in enumerate(SHRINKAGES):
            likeness = statistics.limits("", shrinkage).likeness
            scores[index] += auroc(*(likeness(features[each]) for each in played)) / NUM_ROUNDS
    return SHRINKAGES[int((scores >= scores.max() - _ALIKE).argmax())]


def _eigen(deviations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues (d,) and eigenvectors (d, d) of the covariance of `deviations` (n, d)."""
    return np.linalg.eigh((deviations.T @ deviations).astype(np.float64) / len(deviations))


def _whitening(values: np.ndarray, vectors: np.ndarray, shrinkage: float) -> np.ndarray:
    """A matrix (d, d) that makes the covariance the identity, but for shrinkage."""
    least = max(shrinkage * values.mean(), 1e-12)  # of deviations that are all 0
    return (vectors / np.sqrt(values.clip(0) + least)).astype(np.float32)
