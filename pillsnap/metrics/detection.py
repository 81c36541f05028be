"""Metrics of the detector (one class, pill) by ultralytics' functions: matching, average precision, the curve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pillsnap.metrics.boxes import read_boxes, read_photos
from pillsnap.metrics.coco import coco_precision

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10, dtype=np.float32)
CURVE_POINTS = 101


def detection_metrics(manifest: pa.Table, detections: pa.Table, split: str = "val") -> dict[str, Any]:
    """Average precision, precision and recall over the photos that have a label box for every pill. `map50_coco` and
    `map50_95_coco` are COCO's average precision of the same boxes.

    Photos with a missing label box are left out (`num_photos_left_out`): a correct detection of an unlabelled pill
    would count as a false positive. Photos without a row in `detections` could not be read (`num_photos_unread`).
    """
    predicted = read_boxes(detections)
    photos = read_photos(manifest, split)
    complete = [photo for photo in photos if photo.complete]
    evaluated = [photo for photo in complete if photo.sample_id in predicted]
    hits, scores = [], []
    for photo in evaluated:
        boxes = predicted[photo.sample_id]
        hits.append(match_detections(photo.boxes, boxes.xywh))
        scores.append(boxes.scores)
    found = [predicted[photo.sample_id].xywh for photo in evaluated]
    return {
        **average_precision(hits, scores, sum(len(photo.boxes) for photo in evaluated)),
        **coco_precision([photo.boxes for photo in evaluated], found, scores),
        "num_photos": len(evaluated),
        "num_photos_left_out": len(photos) - len(complete),
        "num_photos_unread": len(complete) - len(evaluated),
    }


def match_detections(labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """Which predictions are correct at each of IOU_THRESHOLDS; bool (m, 10).

    `labels` (n, 4) and `predictions` (m, 4, best score first) are x y w h in pixels of one photo. The matching is
    ultralytics' `BaseValidator.match_predictions`, so the metrics are comparable with its trainer's.
    """
    if not len(labels) or not len(predictions):
        return np.zeros((len(predictions), len(IOU_THRESHOLDS)), dtype=bool)
    import torch

    box_iou, match_predictions, _, _ = _ultralytics()
    overlap = box_iou(torch.from_numpy(_corners(labels)), torch.from_numpy(_corners(predictions)))
    return match_predictions(_Thresholds, torch.zeros(len(predictions)), torch.zeros(len(labels)), overlap).numpy()


def average_precision(hits: Sequence[np.ndarray], scores: Sequence[np.ndarray], num_boxes: int) -> dict[str, Any]:
    """`map50`, `map50_95`, `precision`, `recall` (at the confidence of best F1) and the precision-recall curve.

    `hits` are the arrays of `match_detections` and `scores` the confidences, one array per photo. The metrics are
    those of ultralytics' `ap_per_class`; its interpolation gives at most 0.995. None without a label box.
    """
    metrics: dict[str, Any] = dict.fromkeys(("map50", "map50_95", "precision", "recall", "best_f1_confidence"))
    metrics |= {"num_boxes": num_boxes, "pr_curve": None}
    if not num_boxes:
        return metrics
    _, _, ap_per_class, smooth = _ultralytics()
    tp = np.concatenate([*hits, np.zeros((0, len(IOU_THRESHOLDS)), dtype=bool)])
    confidence = np.concatenate([*scores, np.zeros(0, dtype=np.float32)])
    _, _, precision, recall, _, ap, _, _, _, f1_curve, grid, pr = ap_per_class(
        tp, confidence, np.zeros(len(tp)), np.zeros(num_boxes)
    )
    points = np.linspace(0, len(grid) - 1, CURVE_POINTS).round().astype(int)
    metrics |= {
        "map50": float(ap[0, 0]),
        "map50_95": float(ap[0].mean()),
        "precision": float(precision[0]),
        "recall": float(recall[0]),
        "best_f1_confidence": float(grid[smooth(f1_curve[0], 0.1).argmax()]),
        "pr_curve": {
            "recall": [round(float(value), 4) for value in grid[points]],
            "precision": [round(float(value), 4) for value in pr[0][points]],
        },
    }
    return metrics


def _corners(xywh: np.ndarray) -> np.ndarray:
    return np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1).astype(np.float32)


class _Thresholds:
    """Stands in for the validator: ultralytics' matching reads only its thresholds."""

    iouv: Any = None


def _ultralytics() -> tuple[Any, Any, Any, Any]:
    import torch

    from pillsnap.models.detector import quiet_ultralytics

    quiet_ultralytics()
    from ultralytics.engine.validator import BaseValidator
    from ultralytics.utils.metrics import ap_per_class, box_iou, smooth

    _Thresholds.iouv = torch.from_numpy(IOU_THRESHOLDS)
    return box_iou, BaseValidator.match_predictions, ap_per_class, smooth
