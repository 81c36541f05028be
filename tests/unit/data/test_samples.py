"""Samples of a task: what is trained on, what is left out and counted."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from pillsnap.data.samples import classification_samples, detection_samples, stratified
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


def test_validation_subset_has_the_proportions_of_the_strata_and_stays_the_same() -> None:
    strata = np.repeat([0, 1, 2, 3], [500, 300, 150, 50])
    ids = [f"photo{number}" for number in range(1000)]
    rows = stratified(ids, strata, 100)
    assert np.bincount(strata[rows]).tolist() == [50, 30, 15, 5] and rows.tolist() == sorted(set(rows.tolist()))
    assert np.array_equal(stratified(ids, strata, 100), rows)
    back = np.arange(1000)[::-1]  # the same photos, whatever their order
    assert {ids[i] for i in rows} == {ids[back[i]] for i in stratified([ids[i] for i in back], strata[back], 100)}
    uneven = np.bincount(strata[stratified(ids, strata, 33)], minlength=4)
    assert uneven.sum() == 33 and np.abs(uneven - 0.033 * np.array([500, 300, 150, 50])).max() < 1
    for number in (None, 1000, 5000):
        assert stratified(ids, strata, number).tolist() == list(range(1000))
    assert len(stratified(ids, strata, 1)) == 1 and len(stratified([], strata[:0], 5)) == 0


def test_detection_validates_a_part_with_its_combinations() -> None:
    rows = [(f"s{number}", ["A"], [BOX], "val") for number in range(90)]
    rows += [(f"c{number}", ["A", "B"], [BOX, OTHER], "val") for number in range(10)]
    table = manifest(*rows, ("t", ["A"], [BOX], "train"))
    samples = detection_samples(table, num_val=20)
    chosen = samples.val["sample_id"].to_pylist()
    assert len(set(chosen)) == 20 and sum(name.startswith("c") for name in chosen) == 2
    assert samples.num_val == 100 and len(detection_samples(table).val) == 100
    crops = classification_samples(table, ["A", "B"], num_val=22)
    assert np.bincount(crops.val["label"].to_numpy()).tolist() == [20, 2] and crops.num_val == 110


def test_combinations_come_last_where_they_are_drawn_apart() -> None:
    table = manifest(
        ("c1", ["A", "B"], [BOX, OTHER], "train"), ("s1", ["A"], [BOX], "train"),
        ("c2", ["A", "B"], [BOX, None], "train"), ("s2", ["B"], [BOX], "train"),
        ("c3", ["A", "B"], [BOX, OTHER], "val"),
    )  # fmt: skip
    plain, apart = detection_samples(table), detection_samples(table, combinations_last=True)
    assert plain.train["sample_id"].to_pylist() == ["c1", "s1", "s2"] and plain.num_combinations == 0
    assert apart.train["sample_id"].to_pylist() == ["s1", "s2", "c1"] and apart.num_combinations == 1
    assert apart.train["boxes"].to_pylist()[2] == [BOX, OTHER] and apart.val.equals(plain.val)  # no leak from val
