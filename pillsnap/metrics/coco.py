"""Average precision as COCO defines it (mean of 101 points of the precision-recall curve), by faster-coco-eval.

Lin et al., "Microsoft COCO", 2014. `pillsnap.metrics.detection` has ultralytics' average precision of the same boxes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_MAX_BOXES = 100
_CLASS = 0


def coco_precision(
    labels: Sequence[np.ndarray], predictions: Sequence[np.ndarray], scores: Sequence[np.ndarray]
) -> dict[str, float | None]:
    """`map50_coco` and `map50_95_coco` of one class, over all sizes and at most 100 boxes per photo.

    One array per photo: `labels` (n, 4) and `predictions` (m, 4, best score first) x y w h in pixels, `scores` (m,).
    None without a label box.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    if not sum(map(len, labels)):
        return {"map50_coco": None, "map50_95_coco": None}
    boxes = [(photo, box) for photo, rows in enumerate(labels) for box in rows.tolist()]
    truth = COCO()
    truth.dataset = {
        "images": [{"id": photo} for photo in range(len(labels))],
        "categories": [{"id": _CLASS}],
        "annotations": [
            {"id": i, "image_id": photo, "category_id": _CLASS, "iscrowd": 0, "bbox": box, "area": box[2] * box[3]}
            for i, (photo, box) in enumerate(boxes, start=1)
        ],
    }
    truth.createIndex()
    kept = [np.c_[box[:_MAX_BOXES], score[:_MAX_BOXES]] for box, score in zip(predictions, scores, strict=True)]
    found = np.concatenate(kept)
    photos = np.repeat(np.arange(len(kept)), [len(rows) for rows in kept])
    if not len(found):
        return {"map50_coco": 0.0, "map50_95_coco": 0.0}
    results = truth.loadRes(np.c_[photos, found, np.full(len(found), _CLASS)])
    evaluation = COCOeval_faster(truth, results, "bbox")
    evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
    evaluation.params.maxDets = [_MAX_BOXES]
    evaluation.evaluate()
    evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, 0, 0, 0]  # (10 thresholds, 101 recalls)
    return {"map50_coco": float(precision[0].mean()), "map50_95_coco": float(precision.mean())}
