"""Average precision as COCO defines it, beside ultralytics' own: the mean of 101 points of the precision-recall curve.

Lin et al., "Microsoft COCO", 2014; equal to pycocotools' `COCOeval` for one class, all sizes and 100 boxes a photo.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pillsnap.metrics.boxes import iou_xywh

_THRESHOLDS = np.linspace(0.5, 0.95, 10)
_RECALLS = np.linspace(0, 1, 101)
_MAX_BOXES = 100


def coco_precision(
    labels: Sequence[np.ndarray], predictions: Sequence[np.ndarray], scores: Sequence[np.ndarray]
) -> dict[str, float | None]:
    """`map50_coco` and `map50_95_coco` over photos; None without a label box.

    One array a photo: `labels` (n, 4) and `predictions` (m, 4, best score first) x y w h in pixels, `scores` (m,).
    """
    num_boxes = sum(map(len, labels))
    if not num_boxes:
        return {"map50_coco": None, "map50_95_coco": None}
    none = np.zeros((len(_THRESHOLDS), 0), bool)
    pairs = zip(labels, predictions, strict=True)
    hits = np.concatenate([none, *(_hits(known, found[:_MAX_BOXES]) for known, found in pairs)], axis=1)
    confidence = np.concatenate([np.zeros(0), *(score[:_MAX_BOXES] for score in scores)])
    hits = hits[:, np.argsort(-confidence, kind="stable")]
    each = [_mean_precision(row, num_boxes) for row in hits]
    return {"map50_coco": each[0], "map50_95_coco": float(np.mean(each))}


def _hits(labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """Which predictions are right at each threshold, bool (10, m): best score first, each takes the free label box
    that it overlaps most.
    """
    hits = np.zeros((len(_THRESHOLDS), len(predictions)), bool)
    overlap = iou_xywh(labels, predictions)
    free = np.ones((len(_THRESHOLDS), len(labels)), bool)
    every = np.arange(len(_THRESHOLDS))
    for number in np.flatnonzero(overlap.max(axis=0, initial=0.0) >= _THRESHOLDS[0]):
        possible = np.where(free & (overlap[:, number] >= _THRESHOLDS[:, None]), overlap[:, number], -1.0)
        taken = len(labels) - 1 - possible[:, ::-1].argmax(axis=1)  # of equals the last, as pycocotools
        hits[:, number] = possible[every, taken] > 0
        free[every[hits[:, number]], taken[hits[:, number]]] = False
    return hits


def _mean_precision(hits: np.ndarray, num_boxes: int) -> float:
    right = np.cumsum(hits)
    precision = right / np.arange(1, len(hits) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    at = np.searchsorted(right / num_boxes, _RECALLS, side="left")
    return float(np.append(precision, 0.0)[np.minimum(at, len(precision))].mean())
