"""Boxes and classes come back to the last bit after every format."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pillsnap.errors import UserError
from pillsnap.manifest.export import export_manifest
from pillsnap.manifest.formats.label_rows import to_pixels
from pillsnap.manifest.formats.yolo import from_pixels
from pillsnap.manifest.import_folder import ImportOptions, import_folder
from pillsnap.manifest.table import read_manifest
from tests.unit.manifest.formats.conftest import save_photo, save_text

SHARE = st.floats(0.001, 1, width=64)


def labels_of(manifest: Path) -> dict[str, tuple]:
    columns = ("codes", "boxes", "split", "width", "height")
    return {row["image_path"]: tuple(row[name] for name in columns) for row in read_manifest(manifest).to_pylist()}


def round_trip(root: Path, manifest: Path, work: Path) -> None:
    expected = labels_of(manifest)
    for step, form in enumerate(("coco", "voc", "yolo", "voc", "coco", "yolo")):
        out = work / f"{step}_{form}"
        export_manifest(manifest, form, out)
        manifest = import_folder(out, work / f"{step}_manifest", ImportOptions(form="auto", photos=root))
        assert labels_of(manifest) == expected, form


@pytest.mark.parametrize("layout", ["images/{}/a b.jpg", "{}/images/약.png", "{}/deep/c.webp"])
def test_every_format_after_every_other(tmp_path: Path, layout: str) -> None:
    rng = np.random.default_rng(4)
    for split in ("train", "val", "test"):
        photo = tmp_path / "set" / layout.format(split)
        save_photo(photo, (123, 77))
        rows = [
            f"{i % 3} {x:.6f} {y:.6f} {w:.6f} {h:.6f}" for i, (x, y, w, h) in enumerate(rng.uniform(0.01, 1, (9, 4)))
        ]
        rows.append("2 0.05 0.5 0.1 1")  # at the edge, where rounding leaves 1e-17
        label = str(photo.relative_to(tmp_path / "set").with_suffix(".txt")).replace("images", "labels")
        save_text(tmp_path / "set" / label, "\n".join(rows))
    names = ["0123", "yes", "K-000114"]
    manifest = import_folder(tmp_path / "set", tmp_path / "first", ImportOptions(names))
    round_trip(tmp_path / "set", manifest, tmp_path)


@settings(max_examples=300, deadline=None)
@given(SHARE, SHARE, SHARE, SHARE, st.integers(8, 12_000), st.integers(8, 12_000))
def test_normalised_boxes_are_exact(cx: float, cy: float, w: float, h: float, width: int, height: int) -> None:
    box = tuple(float(np.float32(value)) for value in to_pixels((cx, cy, w, h), width, height))
    again = to_pixels(from_pixels(box, width, height), width, height)  # type: ignore[arg-type]
    assert tuple(float(np.float32(value)) for value in again) == pytest.approx(box, abs=1e-12, rel=0)


def test_photos_without_all_boxes_and_full_folders(tmp_path: Path) -> None:
    from tests.unit.conftest import Tree

    tree = Tree(tmp_path / "root")
    tree.many(3)
    tree.combination(["K-000001", "K-000002"], without=["K-000002"])
    from pillsnap.manifest.build import build_manifest

    manifest = build_manifest(tree.root, tmp_path / "out", num_photos=None, num_classes=None).path
    counts = export_manifest(manifest, "coco", tmp_path / "coco")
    assert counts["with unlabelled pills, left out"] == 1
    assert export_manifest(manifest, "label-studio", tmp_path / "tasks")["with unlabelled pills, left out"] == 0
    for form, message in (("coco", "not empty"), ("pascal", "is none of")):
        with pytest.raises(UserError, match=message):
            export_manifest(manifest, form, tmp_path / "coco")
    with pytest.raises(UserError, match="label-studio or coco"):
        export_manifest(manifest, "yolo", tmp_path / "yolo", predictions={})


def test_predictions_are_pre_annotations(tmp_path: Path) -> None:
    for split in ("train", "val"):
        save_photo(tmp_path / f"set/images/{split}/a.jpg")
        save_text(tmp_path / f"set/labels/{split}/a.txt", "0 0.5 0.5 0.2 0.1")
    manifest = import_folder(tmp_path / "set", tmp_path / "out", ImportOptions(["x", "y"]))
    found = {"images/val/a.jpg": [("x", (10.0, 20.0, 30.0, 40.0), 0.75)]}
    export_manifest(manifest, "label-studio", tmp_path / "tasks", predictions=found)
    tasks = {task["data"]["image"]: task for task in json.loads((tmp_path / "tasks/tasks.json").read_text())}
    (prediction,) = tasks["/data/local-files/?d=images/val/a.jpg"]["predictions"]
    (result,) = prediction["result"]
    assert (prediction["score"], result["value"]["rectanglelabels"]) == (0.75, ["x"])
    assert [result["value"][key] for key in ("x", "y", "width", "height")] == [10.0, 10.0, 30.0, 20.0]
    assert tasks["/data/local-files/?d=images/train/a.jpg"]["predictions"][0]["result"] == []
    export_manifest(manifest, "coco", tmp_path / "coco", predictions=found)
    assert json.loads((tmp_path / "coco/annotations/predictions_val.json").read_text()) == [
        {"image_id": 1, "category_id": 1, "bbox": [10.0, 20.0, 30.0, 40.0], "score": 0.75}
    ]
    again = import_folder(tmp_path / "tasks", tmp_path / "again", ImportOptions(form="auto", photos=tmp_path / "set"))
    assert [row[:1] for row in labels_of(again).values()] == [row[:1] for row in labels_of(manifest).values()]
