"""Rows for new classes from a few of their features, on simulated features of a trained head."""

from __future__ import annotations

import numpy as np
import pytest

from pillsnap.metrics.likeness import fit_likeness
from pillsnap.models.imprinting import Crops, Imprinter

TRAINED, NEW, SIZE = 60, 20, 64


def simulated(seed: int) -> tuple[Crops, np.ndarray, np.ndarray, np.ndarray]:
    """Crops of trained classes with the logits of a head for them; features and labels of new classes, their logits.

    Features share a large mean, as pooled activations do, and vary most in directions that tell nothing.
    """
    rng = np.random.default_rng(seed)
    spread = np.linspace(0.3, 2.0, SIZE)
    means = 3 + rng.normal(0, 1, (TRAINED + NEW, SIZE))
    labels = np.repeat(np.arange(TRAINED + NEW), 30)
    features = (means[labels] + rng.normal(0, 1, (len(labels), SIZE)) * spread).astype(np.float32)
    weight = (means[:TRAINED] - 3) / spread**2 * 0.7
    bias = -(weight * (means[:TRAINED] + 3)).sum(1) / 2
    logits = (features @ weight.T + bias).astype(np.float32)
    old = labels < TRAINED
    return Crops(features[old], logits[old], labels[old]), features[~old], labels[~old], logits[~old]


def imprinter_of(crops: Crops, temperature: float = 1.4) -> Imprinter:
    trained = fit_likeness("model", crops.features, crops.labels)
    return Imprinter(crops, temperature, trained.middle, trained.precision)


@pytest.mark.parametrize(("num_photos", "least"), [(1, 0.55), (5, 0.9), (10, 0.93)])
def test_new_classes_are_named_and_old_ones_kept(num_photos: int, least: float) -> None:
    found, lost = [], []
    for seed in range(2):
        crops, features, labels, logits = simulated(seed)
        imprinter = imprinter_of(crops)
        rows = [imprinter.rows(features[labels == label][:num_photos]) for label in range(TRAINED, TRAINED + NEW)]

        def together(old: np.ndarray, features: np.ndarray, rows: list = rows) -> np.ndarray:
            return np.c_[old, np.stack([(features @ weight.T + bias).max(1) for weight, bias in rows], 1)]

        tested = np.concatenate([np.flatnonzero(labels == label)[10:] for label in range(TRAINED, TRAINED + NEW)])
        found.append((together(logits, features)[tested].argmax(1) == labels[tested]).mean())
        old = together(crops.logits, crops.features).argmax(1) == crops.labels
        lost.append((crops.logits.argmax(1) == crops.labels).mean() - old.mean())
    assert np.mean(found) > least and np.max(lost) < 0.02, (found, lost)


def test_rows_depend_on_the_photos_alone() -> None:
    crops, features, _, _ = simulated(0)
    first, again = (imprinter_of(crops).rows(features[:5]) for _ in range(2))
    assert (first[0] == again[0]).all() and (first[1] == again[1]).all()


def test_classes_of_a_single_crop_do_not_count() -> None:
    """They have no deviation from their mean, and cannot play; the row is finite without them."""
    crops, features, _, _ = simulated(0)
    few = np.r_[np.flatnonzero(crops.labels < 10), [900, 1200]]
    chosen = Crops(crops.features[few], crops.logits[few], crops.labels[few])
    weight, bias = imprinter_of(chosen, 1.0).rows(features[:3])
    assert np.isfinite(weight).all() and np.isfinite(bias).all()
