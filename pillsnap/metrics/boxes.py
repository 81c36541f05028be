"""Labelled photos and predicted boxes as arrays, their overlap and their matching."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

MATCH_IOU = 0.5
MIN_SCORE = 0.001
"""Detections below this score add nothing to average precision."""


@dataclass(frozen=True)
class Photo:
    """One photo of the manifest. `boxes` is float32 (n, 4), x y w h in pixels, NaN where a pill has no label box."""

    sample_id: str
    location: str
    """Of its bytes, see photos/archives.py."""
    image_type: str
    codes: tuple[str, ...]
    boxes: np.ndarray

    @property
    def complete(self) -> bool:
        """Whether every pill of the photo has a label box."""
        return not np.isnan(self.boxes).any()


@dataclass(frozen=True)
class Boxes:
    """Predicted boxes of one photo: `xywh` float32 (n, 4) in pixels and `scores` float32 (n,), highest score first."""

    xywh: np.ndarray
    scores: np.ndarray
    order: np.ndarray
    """Indices of these boxes in the table's row, to sort other columns in the same order."""


def read_photos(manifest: pa.Table, split: str) -> list[Photo]:
    """Photos of one split of a manifest, in its order."""
    rows = manifest.filter(pc.equal(manifest["split"], split)).select(
        ["sample_id", "location", "image_type", "codes", "boxes"]
    )
    columns = (rows[name].to_pylist() for name in rows.column_names)
    return [
        Photo(sample_id, location, image_type, tuple(codes), _label_boxes(boxes))
        for sample_id, location, image_type, codes, boxes in zip(*columns, strict=True)
    ]


def read_boxes(table: pa.Table) -> dict[str, Boxes]:
    """Predicted boxes by sample id. Reads the columns sample_id, boxes (x y w h) and scores."""
    boxes, scores = list_arrays(table["boxes"]), list_arrays(table["scores"])
    found: dict[str, Boxes] = {}
    for sample_id, xywh, score in zip(table["sample_id"].to_pylist(), boxes, scores, strict=True):
        assert sample_id not in found, f"two prediction rows for {sample_id}"
        order = np.argsort(-score, kind="stable")
        found[sample_id] = Boxes(xywh.reshape(-1, 4).astype(np.float32)[order], score.astype(np.float32)[order], order)
    return found


def list_arrays(column: pa.ChunkedArray) -> list[np.ndarray]:
    """One flat numpy array per row of a list column (of lists of 4 numbers, or of numbers) without nulls.

    Reads the column's buffers: a table of 18,000 photos with 300 boxes each has 22 million numbers.
    """
    arrays: list[np.ndarray] = []
    for chunk in column.chunks:
        sizes = pc.list_value_length(chunk).to_numpy(zero_copy_only=False)
        values = chunk.flatten()
        if pa.types.is_nested(values.type):
            values = values.flatten()
            sizes = sizes * 4
        arrays += np.split(values.to_numpy(zero_copy_only=False), np.cumsum(sizes)[:-1]) if len(chunk) else []
    return arrays


def iou_xywh(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Intersection over union of every pair: (n, 4) and (m, 4) boxes x y w h -> (n, m); 0 for empty or NaN boxes."""
    a, b = first[:, None].astype(np.float64), second[None].astype(np.float64)
    low = np.maximum(a[..., :2], b[..., :2])
    high = np.minimum(a[..., :2] + a[..., 2:], b[..., :2] + b[..., 2:])
    overlap = np.clip(high - low, 0, None).prod(-1)
    union = a[..., 2:].prod(-1) + b[..., 2:].prod(-1) - overlap
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.nan_to_num(overlap / union, nan=0.0, posinf=0.0)


def match_boxes(labels: np.ndarray, predictions: np.ndarray, min_iou: float = MATCH_IOU) -> np.ndarray:
    """For each prediction (best score first) the index of the label box it claims, or -1; int64 (m,).

    One to one and greedy: a prediction claims the unclaimed label box that it overlaps most, at `min_iou` or more.
    """
    claimed_by = np.full(len(predictions), -1)
    if not len(labels):
        return claimed_by
    overlap = iou_xywh(labels, predictions)
    for prediction in range(len(predictions)):
        label = int(overlap[:, prediction].argmax())
        if overlap[label, prediction] >= min_iou:
            claimed_by[prediction] = label
            overlap[label] = 0.0
    return claimed_by


def _label_boxes(boxes: Sequence[Sequence[float] | None]) -> np.ndarray:
    missing = (np.nan,) * 4
    return np.array([missing if box is None else box for box in boxes], dtype=np.float32).reshape(-1, 4)
