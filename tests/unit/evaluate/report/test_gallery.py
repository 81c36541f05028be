from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from pillsnap.evaluate.report.gallery import examples, photo_outcomes, picture, worst
from pillsnap.metrics.boxes import read_photos
from pillsnap.photos.reader import PhotoReader
from tests.unit.conftest import MakeTable

CLASSES = ["K-1", "K-2", "K-3"]
LEFT, RIGHT, FAR = [0, 0, 20, 20], [50, 0, 20, 20], [80, 80, 10, 10]


def pair(sample_id: str, **fields: Any) -> dict:
    return {"sample_id": sample_id, "codes": ["K-1", "K-2"], "boxes": [LEFT, RIGHT], **fields}


def outcomes(case: Any) -> list[tuple]:
    return [(pill.outcome, pill.true, pill.predicted) for pill in case.pills]


def test_outcomes_by_the_two_stage_result(manifest_of: MakeTable, pipeline_of: MakeTable) -> None:
    rows = [("a", [LEFT, FAR], [0.9, 0.8], [2, 1]), ("part", [], [], [])]
    photos = read_photos(manifest_of([pair("a"), pair("part", boxes=[LEFT, None])]), "val")
    cases = photo_outcomes(photos, {"pipeline": pipeline_of(rows)}, CLASSES, 0.25)
    assert [case.photo.sample_id for case in cases] == ["a"]
    assert outcomes(cases[0]) == [("wrong", "K-1", "K-3"), ("surplus", None, "K-2"), ("missed", "K-2", None)]
    # Two of two pills wrong, half a mistake for the surplus box, and the confidence of the wrong code.
    assert cases[0].error == pytest.approx((1 + 1 + 0.5) / 2 + 0.2 * 0.9)


def test_outcomes_by_crops_when_there_is_no_detector(manifest_of: MakeTable, crops_of: MakeTable) -> None:
    photos = read_photos(manifest_of([{"sample_id": "s0", "codes": ["K-1"], "boxes": [None]}]), "val")
    cases = photo_outcomes(photos, {"classification": crops_of([0], [[1, 0]])}, CLASSES, 0.25)
    assert outcomes(cases[0]) == [("wrong", "K-1", "K-2")]
    assert cases[0].pills[0].box is None


def test_outcomes_by_detections_when_there_is_no_classifier(manifest_of: MakeTable, detections_of: MakeTable) -> None:
    photos = read_photos(manifest_of([pair("a")]), "val")
    table = detections_of([("a", [LEFT, FAR, RIGHT], [0.9, 0.6, 0.1])])
    cases = photo_outcomes(photos, {"detections": table}, CLASSES, 0.25)
    assert [pill.outcome for pill in cases[0].pills] == ["right", "surplus", "missed"]


def test_no_table_gives_no_outcome(manifest_of: MakeTable) -> None:
    assert photo_outcomes(read_photos(manifest_of([pair("a")]), "val"), {"pipeline": None}, CLASSES, 0.25) == []


def test_largest_errors_first_and_repeated_codes_last(manifest_of: MakeTable, pipeline_of: MakeTable) -> None:
    rows = [pair("twin1"), pair("twin2"), pair("other", codes=["K-1", "K-3"]), pair("fine", codes=["K-2", "K-3"])]
    predictions = [
        ("twin1", [], [], []),
        ("twin2", [], [], []),
        ("other", [LEFT, RIGHT], [0.9, 0.8], [0, 1]),
        ("fine", [LEFT, RIGHT], [0.9, 0.8], [1, 2]),
    ]
    cases = photo_outcomes(read_photos(manifest_of(rows), "val"), {"pipeline": pipeline_of(predictions)}, CLASSES, 0.25)
    assert [case.photo.sample_id for case in worst(cases, 3)] == ["twin1", "other", "twin2"]
    assert [case.photo.sample_id for case in worst(cases, 1)] == ["twin1"]
    assert [case.photo.sample_id for case in examples(cases, 4)] == ["fine"]


def test_picture_is_reduced_with_its_boxes(tmp_path: Path, manifest_of: MakeTable, pipeline_of: MakeTable) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), np.full((1000, 1000, 3), 180, np.uint8))
    row = {"sample_id": "a", "codes": ["K-1", "K-2"], "boxes": [[0, 0, 100, 100], [900, 900, 100, 100]]}
    predictions = [("a", row["boxes"], [0.9, 0.8], [0, 2])]
    photos = read_photos(manifest_of([row]), "val")
    (case,) = photo_outcomes(photos, {"pipeline": pipeline_of(predictions)}, CLASSES, 0.25)
    shown = picture(case, PhotoReader(str(tmp_path), 10**7))
    assert (shown["drawing"]["width"], shown["drawing"]["height"]) == (480, 480)
    assert shown["drawing"]["boxes"] == [("right", [0, 0, 48, 48]), ("wrong", [432, 432, 48, 48])]
    assert shown["pills"] == [("right", "K-1, 90 %"), ("wrong", "K-2 taken for K-3, 90 %")]


def test_one_small_pill_is_enlarged_twice(tmp_path: Path, manifest_of: MakeTable, pipeline_of: MakeTable) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), np.full((960, 960, 3), 180, np.uint8))
    row = {"sample_id": "a", "codes": ["K-1"], "boxes": [[430, 430, 100, 100]]}
    photos = read_photos(manifest_of([row]), "val")
    (case,) = photo_outcomes(photos, {"pipeline": pipeline_of([("a", row["boxes"], [0.9], [0])])}, CLASSES, 0.25)
    shown = picture(case, PhotoReader(str(tmp_path), 10**7))
    assert shown["drawing"]["boxes"] == [("right", [190, 190, 100, 100])]


def test_unreadable_photo_has_its_reason(tmp_path: Path, manifest_of: MakeTable, pipeline_of: MakeTable) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    photos = read_photos(manifest_of([pair("a"), pair("gone")]), "val")
    table = pipeline_of([("a", [], [], []), ("gone", [], [], [])])
    cases = photo_outcomes(photos, {"pipeline": table}, CLASSES, 0.25)
    for case, reason in zip(cases, ("not_an_image", "missing"), strict=True):
        shown = picture(case, PhotoReader(str(tmp_path), 10**7))
        assert shown["drawing"] is None and shown["problem"].startswith(reason)
