"""A tiny AI Hub tree, small manifests and prediction tables: built by hand, so that a test knows what is in them."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pillsnap.manifest.table import SCHEMA, with_locations

FLOATS = pa.list_(pa.float32())
INTS = pa.list_(pa.int64())
MakeTable = Callable[..., pa.Table]


@pytest.fixture(autouse=True)
def _no_thread_of_the_package_is_left() -> Iterator[None]:
    """A thread that outlives its test reads and writes in the middle of the next ones."""
    before = set(threading.enumerate())
    yield
    end_s = time.monotonic() + 5
    while left := [thread for thread in threading.enumerate() if thread not in before and _is_ours(thread)]:
        assert time.monotonic() < end_s, f"still run after the test: {left}"
        time.sleep(0.02)


def _is_ours(thread: threading.Thread) -> bool:
    target = getattr(thread, "_target", None)  # deleted when the thread ends
    return str(getattr(target, "__module__", "")).startswith("pillsnap")


class Tree:
    """Writes photos and labels in the AI Hub layout. Photos are 1-byte files unless pixels are asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def single(
        self,
        code: str,
        *,
        direction: int = 0,
        light: int = 0,
        latitude: int = 75,
        longitude: int = 0,
        part: int = 1,
        label: dict[str, Any] | bytes | None = None,
        tree: str = "train",
        pixels: bool = False,
    ) -> Path:
        """One photo of one pill. `label`: fields to change, raw bytes, or None for a good one."""
        stem = f"{code}_0_2_{direction}_{light}_{latitude}_{longitude:03d}_200"
        base = self.root / tree
        photo = base / "images/single" / f"TS_{part}_single" / code / f"{stem}.png"
        self._photo(photo, pixels)
        self._label(base / "labels/single" / f"TL_{part}_single" / f"{code}_json" / f"{stem}.json", code, label)
        return photo

    def combination(self, codes: Sequence[str], *, latitude: int = 70, part: int = 1, without: Sequence[str] = (),
                    boxes: dict[str, list[float]] | None = None, pixels: bool = False) -> Path:  # fmt: skip
        """One photo of several pills; codes in `without` get no label file."""
        prefix = "K-" + "-".join(code[2:] for code in codes)
        stem = f"{prefix}_0_2_0_2_{latitude}_000_200"
        base = self.root / "train"
        photo = base / "images/combination" / f"TS_{part}_combo" / prefix / f"{stem}.png"
        self._photo(photo, pixels)
        for index, code in enumerate(codes):
            if code not in without:
                folder = base / "labels/combination" / f"TL_{part}_combo" / f"{prefix}_json" / code
                change = {"bbox": boxes[code] if boxes else [10 + index, 12, 20.5, 8]}
                self._label(folder / f"{stem}.json", code, change)
        return photo

    def many(self, num_classes: int, longitudes: int = 6, combinations: int = 4) -> None:
        """Classes K-000001…, each `longitudes` x 2 sides x 2 lights, and triples of neighbours at three latitudes."""
        codes = [f"K-{number:06d}" for number in range(1, num_classes + 1)]
        for code in codes:
            for longitude in range(longitudes):
                for direction in (0, 1):
                    for light in (0, 1):
                        self.single(code, direction=direction, light=light, longitude=longitude * 20)
        for number in range(combinations):
            for latitude in (70, 75, 90):
                self.combination([codes[(number + i) % num_classes] for i in range(3)], latitude=latitude)

    def _photo(self, path: Path, pixels: bool) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not pixels:
            path.write_bytes(b"x")
            return
        import cv2

        seed = sum(path.name.encode()) + 1000 * len(list(path.parent.iterdir()))
        cv2.imwrite(str(path), np.random.default_rng(seed).integers(0, 255, (60, 50, 3), dtype=np.uint8))

    def _label(self, path: Path, code: str, change: dict[str, Any] | bytes | None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(change, bytes):
            path.write_bytes(change)
            return
        path.write_text(json.dumps(label_document(code, **(change or {})), ensure_ascii=False), encoding="utf-8")


def label_document(code: str, **change: Any) -> dict[str, Any]:
    """A label as the official files write it, with `bbox` and fields of images[0] changed."""
    bbox = change.pop("bbox", [10, 12, 20.5, 8])
    image = {"file_name": "x.png", "width": 50, "height": 60, "drug_N": code, "dl_mapping_code": code,
             "dl_name": f"약 {code}", "di_edi_code": "642200750,A13100741"} | change  # fmt: skip
    annotation = {"bbox": bbox, "area": 164, "category_id": 1, "id": 1, "image_id": 1, "segmentation": []}
    return {"images": [image], "annotations": [annotation], "categories": [{"id": 1, "name": "Drug"}]}


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """An empty tree beneath tmp_path/root."""
    return Tree(tmp_path / "root")


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
    return with_locations(pa.Table.from_pylist(filled, schema=SCHEMA))


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
            "held_out_confidence": pa.array([row[0] for row in probs], pa.float32()),
        }
    )
