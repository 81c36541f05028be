"""Report data on the classifier: the confusion matrix and the metrics of every class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pillsnap.manifest.table import ClassInfo
from pillsnap.metrics.classification import confused_pairs, confusion_matrix, per_class, read_crops

MAX_MATRIX_CLASSES = 60
_MOST_CONFUSED_CLASSES = 40


def class_rows(table: pa.Table, classes: Sequence[ClassInfo]) -> list[dict[str, Any]]:
    """Every class with its name and metrics, worst F1 first."""
    crops = read_crops(table)
    rows = per_class(crops.labels, crops.predicted, [info.code for info in classes])
    rows = [{**row, "name": info.name} for row, info in zip(rows, classes, strict=True)]
    return sorted(rows, key=lambda row: (row["f1"] is None, row["f1"] or 0.0, -row["n"], row["code"]))


def confusion(table: pa.Table, classes: Sequence[str]) -> dict[str, Any] | None:
    """The confusion matrix of all classes or, of more than MAX_MATRIX_CLASSES, of the most confused ones.

    One row per true class; a cell is None or has `count`, `total` of the row and `opacity`. None without a crop.
    """
    crops = read_crops(table)
    matrix = confusion_matrix(crops.labels, crops.predicted, len(classes))
    chosen = set(range(len(classes)))
    if len(classes) > MAX_MATRIX_CLASSES:
        chosen = set()
        index = {code: i for i, code in enumerate(classes)}
        for pair in confused_pairs(crops.labels, crops.predicted, classes):
            chosen |= {index[pair["true"]], index[pair["predicted"]]}
            if len(chosen) >= _MOST_CONFUSED_CLASSES:
                break
    if not chosen or not matrix.any():
        return None
    shown, totals = sorted(chosen), matrix.sum(1)
    counts = matrix[np.ix_(shown, shown)].tolist()
    rows = [
        [_cell(count, int(totals[true])) if count else None for count in row]
        for true, row in zip(shown, counts, strict=True)
    ]
    return {"codes": [classes[i] for i in shown], "rows": rows, "is_part": len(classes) > MAX_MATRIX_CLASSES}


def _cell(count: int, total: int) -> dict[str, Any]:
    return {"count": count, "total": total, "opacity": round(0.12 + 0.88 * math.sqrt(count / total), 2)}
