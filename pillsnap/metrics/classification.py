"""Metrics of the classifier on labelled crops: accuracy, macro-F1, confusion, one row per class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pillsnap.metrics.boxes import list_arrays
from pillsnap.metrics.calibration import calibration_error

IMAGE_TYPES = ("single", "combination")
NO_ANSWER = -2
"""Index of no class; -1 is a class that was not trained."""


@dataclass(frozen=True)
class Crops:
    """The classification table as arrays: `labels` (n,), `top` (n, k) class indices and `probs` (n, k), best first.

    A crop whose logits were not finite has NO_ANSWER in `top` and 0 in `probs`.
    """

    image_types: np.ndarray
    labels: np.ndarray
    top: np.ndarray
    probs: np.ndarray
    raw: np.ndarray
    """Confidence in the best class before calibration, (n,)."""

    @property
    def predicted(self) -> np.ndarray:
        return self.top[:, 0]


def read_crops(table: pa.Table) -> Crops:
    """Arrays of a classification table. The label -1 stands for a class that was not trained."""
    if not table.num_rows:
        return Crops(np.zeros(0, str), np.zeros(0, int), np.zeros((0, 1), int), np.zeros((0, 1)), np.zeros(0))
    probs = np.stack(list_arrays(table["top_probs"])).astype(np.float64)
    top = np.stack(list_arrays(table["top_indices"])).astype(np.int64)
    return Crops(
        np.array(table["image_type"].to_pylist()),
        np.array(table["label"].to_pylist(), dtype=np.int64),
        np.where(probs[:, :1] > 0, top, NO_ANSWER),
        probs,
        table["raw_confidence"].to_numpy().astype(np.float64),
    )


def classification_metrics(table: pa.Table, classes: Sequence[str], num_pairs: int = 30) -> dict[str, Any]:
    """Top-1, top-5 and macro-F1, overall and by image type, with calibration and the most confused pairs.

    `calibration` describes confidences at a temperature that the crop itself did not fit; `ece_before` is the error
    before the temperature.
    """
    crops = read_crops(table)
    return {
        **accuracies(table, len(classes)),
        "num_classes": len(classes),
        "num_unknown_class": int((_known(crops.labels, len(classes)) == len(classes)).sum()),
        "calibration": calibration_error(
            table["held_out_confidence"].to_numpy().astype(np.float64), crops.predicted == crops.labels
        )
        | {"ece_before": calibration_error(crops.raw, crops.predicted == crops.labels)["ece"]},
        "confused_pairs": confused_pairs(crops.labels, crops.predicted, classes, limit=num_pairs),
    }


def class_hits(crops: Crops, num_classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labelled crops of each class, and how many have it as the first and among the first five answers; each int64
    (num_classes,).
    """
    labels = _known(crops.labels, num_classes)
    hits = crops.top == labels[:, None]
    groups = (labels, labels[hits[:, :1].any(1)], labels[hits[:, :5].any(1)])
    n, first, five = (np.bincount(group, minlength=num_classes + 1)[:num_classes] for group in groups)
    return n, first, five


def accuracies(table: pa.Table, num_classes: int) -> dict[str, Any]:
    """Top-1, top-5, macro-F1 and number of crops, overall and by image type; None without crops."""
    crops = read_crops(table)
    return {
        **_accuracy(crops, np.ones(len(crops.labels), dtype=bool), num_classes),
        **{name: _accuracy(crops, crops.image_types == name, num_classes) for name in IMAGE_TYPES},
    }


def per_class(labels: np.ndarray, predicted: np.ndarray, classes: Sequence[str]) -> list[dict[str, Any]]:
    """One row per class: code, `n` labelled crops, precision, recall, F1; None where the denominator is 0."""
    n, named, correct = _counts(labels, predicted, len(classes))
    return [
        {
            "code": code,
            "n": int(n[i]),
            "precision": float(correct[i] / named[i]) if named[i] else None,
            "recall": float(correct[i] / n[i]) if n[i] else None,
            "f1": float(2 * correct[i] / (n[i] + named[i])) if n[i] + named[i] else None,
        }
        for i, code in enumerate(classes)
    ]


def confused_pairs(
    labels: np.ndarray, predicted: np.ndarray, classes: Sequence[str], limit: int | None = None
) -> list[dict[str, Any]]:
    """The most frequent mistakes: `true` code, `predicted` code, `count`, and `n` labelled crops of the true class."""
    size = len(classes)
    true, guessed = _known(labels, size), _known(predicted, size)
    n = np.bincount(true, minlength=size + 1)
    wrong = (true != guessed) & (true < size) & (guessed < size)
    pairs, counts = np.unique(true[wrong] * size + guessed[wrong], return_counts=True)
    order = np.argsort(-counts, kind="stable")[:limit]
    return [
        {"true": classes[t], "predicted": classes[p], "count": int(count), "n": int(n[t])}
        for (t, p), count in zip((divmod(pair, size) for pair in pairs[order].tolist()), counts[order], strict=True)
    ]


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts, int32 (num_classes, num_classes): true rows, predicted columns; unknown classes are left out."""
    matrix = np.zeros((num_classes + 1, num_classes + 1), dtype=np.int32)
    np.add.at(matrix, (_known(labels, num_classes), _known(predicted, num_classes)), 1)
    return matrix[:num_classes, :num_classes]


def _accuracy(crops: Crops, chosen: np.ndarray, num_classes: int) -> dict[str, Any]:
    labels = _known(crops.labels[chosen], num_classes)
    if not len(labels):
        return {"top1": None, "top5": None, "macro_f1": None, "num_samples": 0}
    hits = crops.top[chosen] == labels[:, None]
    return {
        "top1": float(hits[:, 0].mean()),
        "top5": float(hits[:, :5].any(1).mean()),
        "macro_f1": macro_f1(labels, crops.predicted[chosen], num_classes),
        "num_samples": len(labels),
    }


def macro_f1(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> float:
    """Mean F1 over the classes that are labelled or predicted at least once.

    A crop of a class that was not trained counts as a false positive of its predicted class.
    """
    n, named, correct = _counts(labels, predicted, num_classes)
    seen = n + named > 0
    return float((2 * correct[seen] / (n + named)[seen]).mean()) if seen.any() else 0.0


def _counts(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labelled, predicted and correct crops of each class; int64 (num_classes,) each."""
    true, guessed = _known(labels, num_classes), _known(predicted, num_classes)
    groups = (true, guessed, true[true == guessed])
    n, named, correct = (np.bincount(group, minlength=num_classes + 1)[:num_classes] for group in groups)
    return n, named, correct


def _known(indices: np.ndarray, num_classes: int) -> np.ndarray:
    """Class indices; every index outside the class list becomes `num_classes`."""
    indices = np.asarray(indices, dtype=np.int64)
    return np.where((indices >= 0) & (indices < num_classes), indices, num_classes)
