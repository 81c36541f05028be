"""TODO docstring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pillsnap.metrics.boxes import list_arrays
from pillsnap.metrics.detection import _rounded

CALIBRATION_BINS = 15


IMAGE_TYPES = ("single", "combination")


@dataclass(frozen=True)
class Crops:
    """The classification table as arrays: `labels` (n,), `top` (n, k) class indices and `probs` (n, k), best first."""

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
    """Arrays of a classification table. A label outside the class list (-1) belongs to a class that was not trained."""
    if not table.num_rows:
        return Crops(np.zeros(0, str), np.zeros(0, int), np.zeros((0, 1), int), np.zeros((0, 1)), np.zeros(0))
    return Crops(
        np.array(table["image_type"].to_pylist()),
        np.array(table["label"].to_pylist(), dtype=np.int64),
        np.stack(list_arrays(table["top_indices"])).astype(np.int64),
        np.stack(list_arrays(table["top_probs"])).astype(np.float64),
        table["raw_confidence"].to_numpy().astype(np.float64),
    )


def classification_metrics(table: pa.Table, classes: Sequence[str], num_pairs: int = 30) -> dict[str, Any]:
    """Top-1, top-5 and macro-F1, overall and by image type, with calibration and the most confused pairs.

    `calibration` is of the confidences as given to users; `ece_before` is their error before the temperature.
    """
    crops = read_crops(table)
    return {
        **_accuracy(crops, np.ones(len(crops.labels), dtype=bool), len(classes)),
        **{name: _accuracy(crops, crops.image_types == name, len(classes)) for name in IMAGE_TYPES},
        "num_classes": len(classes),
        "num_unknown_class": int((_known(crops.labels, len(classes)) == len(classes)).sum()),
        "calibration": calibration(crops.probs[:, 0], crops.predicted == crops.labels)
        | {"ece_before": calibration(crops.raw, crops.predicted == crops.labels)["ece"]},
        "confused_pairs": confused_pairs(crops.labels, crops.predicted, classes, limit=num_pairs),
    }


def per_class(labels: np.ndarray, predicted: np.ndarray, classes: Sequence[str]) -> list[dict[str, Any]]:
    """One row a class: code, `n` labelled crops, precision, recall, F1; None where there is nothing to divide by."""
    size = len(classes)
    true, guessed = _known(labels, size), _known(predicted, size)
    n = np.bincount(true, minlength=size + 1)[:size]
    named = np.bincount(guessed, minlength=size + 1)[:size]
    right = np.bincount(true[true == guessed], minlength=size + 1)[:size]
    return [
        {
            "code": code,
            "n": int(n[i]),
            "precision": float(right[i] / named[i]) if named[i] else None,
            "recall": float(right[i] / n[i]) if n[i] else None,
            "f1": float(2 * right[i] / (n[i] + named[i])) if n[i] + named[i] else None,
        }
        for i, code in enumerate(classes)
    ]


def confused_pairs(
    labels: np.ndarray, predicted: np.ndarray, classes: Sequence[str], limit: int | None = None
) -> list[dict[str, Any]]:
    """The commonest mistakes: `true` code, `predicted` code, `count`, and `n` labelled crops of the true class."""
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
    """Counts, int32 (num_classes, num_classes), rows true and columns predicted; unknown classes are left out."""
    matrix = np.zeros((num_classes + 1, num_classes + 1), dtype=np.int32)
    np.add.at(matrix, (_known(labels, num_classes), _known(predicted, num_classes)), 1)
    return matrix[:num_classes, :num_classes]


def calibration(confidence: np.ndarray, right: np.ndarray, num_bins: int = CALIBRATION_BINS) -> dict[str, Any]:
    """Expected calibration error (Guo et al. 2017, equal-width bins, L1) and the reliability curve by bin.

    Empty bins have None for `confidence` (mean) and `accuracy`.
    """
    bins = np.minimum((np.asarray(confidence) * num_bins).astype(int), num_bins - 1)
    count = np.bincount(bins, minlength=num_bins)
    with np.errstate(invalid="ignore"):
        mean_confidence = np.bincount(bins, weights=confidence, minlength=num_bins) / count
        accuracy = np.bincount(bins, weights=np.asarray(right, dtype=float), minlength=num_bins) / count
    gaps = np.nan_to_num(np.abs(mean_confidence - accuracy))
    return {
        "ece": float((gaps * count).sum() / count.sum()) if count.sum() else None,
        "count": count.tolist(),
        "confidence": _rounded(mean_confidence),
        "accuracy": _rounded(accuracy),
    }


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
    """Mean F1 over the classes that are labelled or predicted at least once (torchmetrics' macro average).

    Crops of a class that was not trained are mistakes of the class they are given, and no class of their own.
    """
    import torch
    from torchmetrics.functional.classification import multiclass_f1_score

    true, guessed = _known(labels, num_classes), _known(predicted, num_classes)
    seen = np.union1d(true, guessed)
    scores = multiclass_f1_score(
        torch.from_numpy(guessed), torch.from_numpy(true), num_classes=num_classes + 1, average="none"
    )
    return float(scores[seen[seen < num_classes]].mean()) if (seen < num_classes).any() else 0.0


def _known(indices: np.ndarray, num_classes: int) -> np.ndarray:
    """Class indices with everything outside the class list put into one extra class, `num_classes`."""
    indices = np.asarray(indices, dtype=np.int64)
    return np.where((indices >= 0) & (indices < num_classes), indices, num_classes)
