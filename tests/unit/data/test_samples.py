"""Samples of a task: what is trained on, what is left out and counted."""

from __future__ import annotations

import pyarrow as pa
import pytest

from pillsnap.data.samples import classification_samples, detection_samples
from pillsnap.errors import UserError
from pillsnap.manifest.table import SCHEMA, with_locations

BOX, OTHER = [1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]


def manifest(*rows: tuple[str, list[str], list, str]) -> pa.Table:
    table = pa.Table.from_pylist(
        [
            {"sample_id": name, "image_path": f"{name}.png",
             "image_type": "combination" if len(codes) > 1 else "single", "codes": codes, "boxes": boxes,
             "width": 100, "height": 100, "group": name, "split": split, "source": "test"}
            for name, codes, boxes, split in rows
        ],
        SCHEMA,
    )  # fmt: skip
    return with_locations(table)


def test_photos_with_unlabelled_pills_are_left_out_of_detection() -> None:
    table = manifest(
        ("whole", ["A", "B"], [BOX, OTHER], "train"),
        ("lacking", ["A", "B"], [BOX, None], "train"),
        ("empty", [], [], "train"),
        ("labelled", ["A"], [BOX], "val"),
        ("unlabelled", ["A"], [None], "val"),
    )
    samples = detection_samples(table)
    assert samples.train["sample_id"].to_pylist() == ["whole", "empty"]
    assert samples.val["sample_id"].to_pylist() == ["labelled"]
    assert samples.train["boxes"].to_pylist() == [[BOX, OTHER], []]
    assert samples.left_out == {"photos with unlabelled pills": 2}
    assert samples.train["complete"].to_pylist() == [True, True]
    kept = detection_samples(table, keep_incomplete=True)
    assert kept.train["complete"].to_pylist() == [True, False, True]
    assert kept.train["boxes"].to_pylist() == [[BOX, OTHER], [BOX], []]
    assert kept.val["sample_id"].to_pylist() == ["labelled"]


def test_every_labelled_pill_is_a_crop() -> None:
    table = manifest(
        ("p", ["B", "A"], [BOX, None], "train"), ("q", ["A"], [OTHER], "val"), ("r", ["Z"], [BOX], "train")
    )
    samples = classification_samples(table, ["A", "B"])
    assert samples.train["sample_id"].to_pylist() == ["p#0"]
    assert samples.train["label"].to_pylist() == [1]
    assert samples.val.to_pylist() == [
        {
            "sample_id": "q#0",
            "location": "q.png",
            "photo_id": "q",
            "image_type": "single",
            "box_index": 0,
            "box": OTHER,
            "label": 0,
        }
    ]
    assert samples.left_out == {"pills without a box": 1, "pills of a class without training photos": 1}


def test_found_boxes_replace_missing_ones() -> None:
    table = manifest(("p", ["A", "B"], [BOX, None], "train"))
    samples = classification_samples(table, ["A", "B"], {"p": [None, OTHER]})
    assert samples.train["box"].to_pylist() == [BOX, OTHER]
    assert samples.left_out["pills without a box"] == 0


def test_manifest_without_labelled_pills_is_an_error() -> None:
    with pytest.raises(UserError, match="no labelled pill"):
        classification_samples(manifest(("p", ["A"], [None], "train")), ["A"])
