"""Accuracy of one answer from photos of both sides of a pill, beside the answers from each photo alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pillsnap.metrics.calibration import calibration_error
from pillsnap.metrics.evidence import both_sides


@dataclass(frozen=True)
class SidePairs:
    """Pairs of photos of one pill: class indices `labels` (n,) and calibrated logits of each photo (n, classes)."""

    labels: np.ndarray
    front: np.ndarray
    back: np.ndarray


def both_sides_metrics(pairs: SidePairs) -> dict[str, Any]:
    """`num_pairs`, `num_classes`; `top1`, `top5` and the calibration error `ece` of the joint answers, and the same
    under `front` and `back` of the same photos alone.
    """
    answers = {"": both_sides(pairs.front, pairs.back), "front": pairs.front, "back": pairs.back}
    metrics = {name: _accuracy(logits, pairs.labels) for name, logits in answers.items()}
    sizes = {"num_pairs": len(pairs.labels), "num_classes": len(np.unique(pairs.labels))}
    return sizes | metrics.pop("") | metrics


def _accuracy(logits: np.ndarray, labels: np.ndarray) -> dict[str, float | None]:
    top = np.argsort(-logits, axis=1, kind="stable")[:, :5]
    shares = np.exp(logits - logits.max(1, keepdims=True))
    hits = top == labels[:, None]
    return {
        "top1": float(hits[:, 0].mean()),
        "top5": float(hits.any(1).mean()),
        "ece": calibration_error(1 / shares.sum(1), hits[:, 0])["ece"],
    }
