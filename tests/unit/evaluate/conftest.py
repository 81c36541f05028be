"""Small manifests and prediction tables, built by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pillsnap.data.manifest import SCHEMA

FLOATS = pa.list_(pa.float32())
INTS = pa.list_(pa.int64())


@pytest.fixture
def manifest_of() -> Callable[..., pa.Table]:
    return build_manifest


@pytest.fixture
def detections_of() -> Callable[..., pa.Table]:
    return build_detections


@pytest.fixture
def crops_of() -> Callable[..., pa.Table]:
    return build_crops


@pytest.fixture
def pipeline_of() -> Callable[..., pa.Table]:
    return build_pipeline


def build_manifest(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """A manifest of rows that name at least sample_id, codes and boxes."""
    filled = []
    for row in rows:
        common = {
            "image_path": f"{row['sample_id']}.png",
            "image_type": "combination" if len(row["codes"]) > 1 else "single",
            "width": 100,
            "height": 100,
            "group": row["sample_id"],
            "split": "val",
            "source": "test",
        }
        filled.append({**common, **row})
    return pa.Table.from_pylist(filled, schema=SCHEMA)


def build_detections(rows: Sequence[tuple[str, list[Any], list[float]]]) -> pa.Table:
    """Rows (sample_id, boxes, scores)."""
    return pa.table(
        {
            "sample_id": pa.array([row[0] for row in rows], pa.string()),
            "image_type": pa.array(["combination"] * len(rows), pa.string()),
            "boxes": pa.array([row[1] for row in rows], pa.list_(FLOATS)),
            "scores": pa.array([row[2] for row in rows], FLOATS),
        }
    )


def build_pipeline(rows: Sequence[tuple[str, list[Any], list[float], list[int]]]) -> pa.Table:
    """Rows (sample_id, boxes, scores, class indices)."""
    table = build_detections([row[:3] for row in rows])
    table = table.append_column("indices", pa.array([row[3] for row in rows], INTS))
    return table.append_column("probs", pa.array([[0.9] * len(row[3]) for row in rows], FLOATS))


def build_crops(
    labels: Sequence[int],
    top: Sequence[Sequence[int]],
    probs: Sequence[Sequence[float]] | None = None,
    image_types: Sequence[str] | None = None,
) -> pa.Table:
    if probs is None:
        probs = [np.linspace(0.9, 0.1, len(row)).tolist() for row in top]
    return pa.table(
        {
            "sample_id": pa.array([f"s{i}" for i in range(len(labels))], pa.string()),
            "image_type": pa.array(image_types or ["single"] * len(labels), pa.string()),
            "box_index": pa.array([0] * len(labels), pa.int64()),
            "label": pa.array(list(labels), pa.int64()),
            "top_indices": pa.array([list(row) for row in top], INTS),
            "top_probs": pa.array([list(row) for row in probs], FLOATS),
            "raw_confidence": pa.array([row[0] for row in probs], pa.float32()),
        }
    )
