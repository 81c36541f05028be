"""Boxes unlabelled pills with the trained detector, so that they can be cropped for classification."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from pillsnap.config import Settings
from pillsnap.evaluate.inference import infer
from pillsnap.metrics.boxes import iou_xywh

_SAME_PILL_IOU = 0.5
Box = list[float]


def photos_without_boxes(manifest: pa.Table) -> pa.Table:
    """Rows with at least one pill without a box."""
    unboxed = [any(box is None for box in boxes) for boxes in manifest["boxes"].to_pylist()]
    return manifest.filter(pa.array(unboxed, pa.bool_()))


def predict_boxes(photos: pa.Table, run: str | Path, settings: Settings, data_root: str) -> dict[str, list[Box | None]]:
    """Per photo the detector's boxes for its unlabelled pills, in the order of its codes; None where ambiguous."""
    known = {row["sample_id"]: row["boxes"] for row in photos.select(["sample_id", "boxes"]).to_pylist()}
    found: dict[str, list[Box | None]] = {}
    for row in infer(photos, run, settings, [], data_root, classify=False, min_score=settings.evaluation.confidence):
        if row["error"] is None:
            sure = [
                box
                for box, score in zip(row["boxes"], row["scores"], strict=True)
                if score >= settings.evaluation.confidence
            ]
            found[row["sample_id"]] = assign_boxes(known[row["sample_id"]], sure)
    return found


def assign_boxes(labelled: list[Box | None], found: list[Box]) -> list[Box | None]:
    """Boxes for the unlabelled pills of one photo, from `found` (best first).

    A single unlabelled pill gets the best box that overlaps no labelled one. With several, the assignment is ambiguous:
    None.
    """
    if sum(box is None for box in labelled) != 1:
        return [None] * len(labelled)
    taken = np.array([box for box in labelled if box is not None], np.float32).reshape(-1, 4)
    free = [box for box in found if not (iou_xywh(np.array([box], np.float32), taken) >= _SAME_PILL_IOU).any()]
    return [free[0] if box is None and free else None for box in labelled]
