from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from pillsnap.metrics.end_to_end import pipeline_metrics
from tests.unit.conftest import MakeTable

CLASSES = ["K-1", "K-2", "K-3"]
LEFT, RIGHT, FAR = [0, 0, 20, 20], [50, 0, 20, 20], [80, 80, 10, 10]


def pair(sample_id: str, **fields: Any) -> dict:
    return {"sample_id": sample_id, "codes": ["K-1", "K-2"], "boxes": [LEFT, RIGHT], **fields}


def test_every_pill_correct(manifest_of: MakeTable, pipeline_of: MakeTable) -> None:
    metrics = pipeline_metrics(
        manifest_of([pair("a")]), pipeline_of([("a", [RIGHT, LEFT], [0.9, 0.8], [1, 0])]), CLASSES
    )
    names = ("pill_accuracy", "photo_accuracy", "photo_accuracy_strict", "detected", "named_if_detected")
    assert [metrics[name] for name in names] == [1.0] * 5
    assert (metrics["num_pills"], metrics["num_photos"], metrics["surplus_per_photo"]) == (2, 1, 0.0)


def test_pills_lost_by_each_model(manifest_of: MakeTable, pipeline_of: MakeTable) -> None:
    rows = [
        ("named", [LEFT, RIGHT], [0.9, 0.8], [0, 2]),  # both found, one wrong code
        ("found", [LEFT], [0.9], [0]),  # one pill not found
    ]
    metrics = pipeline_metrics(manifest_of([pair("named"), pair("found")]), pipeline_of(rows), CLASSES)
    assert metrics["pill_accuracy"] == pytest.approx(2 / 4)
    assert metrics["detected"] == pytest.approx(3 / 4)
    assert metrics["named_if_detected"] == pytest.approx(2 / 3)
    assert metrics["photo_accuracy"] == 0.0


def test_surplus_box_lowers_only_the_strict_metric(manifest_of: MakeTable, pipeline_of: MakeTable) -> None:
    rows = [("a", [LEFT, RIGHT, FAR], [0.9, 0.8, 0.7], [0, 1, 2])]
    metrics = pipeline_metrics(manifest_of([pair("a")]), pipeline_of(rows), CLASSES)
    assert (metrics["photo_accuracy"], metrics["photo_accuracy_strict"]) == (1.0, 0.0)
    assert metrics["surplus_per_photo"] == 1.0


def test_higher_score_claims_the_pill_whatever_its_code(manifest_of: MakeTable, pipeline_of: MakeTable) -> None:
    one = {"sample_id": "a", "codes": ["K-1"], "boxes": [LEFT], "image_type": "combination"}
    rows = [("a", [LEFT, LEFT], [0.4, 0.9], [0, 2])]  # the correct code has the lower score
    assert pipeline_metrics(manifest_of([one]), pipeline_of(rows), CLASSES)["pill_accuracy"] == 0.0


def test_correct_code_elsewhere_does_not_count(manifest_of: MakeTable, pipeline_of: MakeTable) -> None:
    rows = [("a", [FAR, RIGHT], [0.9, 0.8], [0, 1])]
    metrics = pipeline_metrics(manifest_of([pair("a")]), pipeline_of(rows), CLASSES)
    assert metrics["pill_accuracy"] == 0.5


def test_two_pills_of_one_code(manifest_of: MakeTable, pipeline_of: MakeTable) -> None:
    twins = pair("a", codes=["K-1", "K-1"])
    rows = [("a", [LEFT, RIGHT], [0.9, 0.8], [0, 0])]
    assert pipeline_metrics(manifest_of([twins]), pipeline_of(rows), CLASSES)["photo_accuracy"] == 1.0


def test_only_combination_photos_with_complete_labels_count(manifest_of: MakeTable, pipeline_of: MakeTable) -> None:
    manifest = manifest_of(
        [
            pair("whole"),
            pair("part", boxes=[LEFT, None]),
            pair("unread"),
            {"sample_id": "single", "codes": ["K-1"], "boxes": [LEFT]},
            pair("trained", split="train"),
        ]
    )
    rows = [(name, [], [], []) for name in ("whole", "part", "single", "trained")]
    metrics = pipeline_metrics(manifest, pipeline_of(rows), CLASSES)
    assert (metrics["num_photos"], metrics["num_photos_left_out"], metrics["num_photos_unread"]) == (1, 1, 1)
    assert (metrics["pill_accuracy"], metrics["detected"], metrics["named_if_detected"]) == (0.0, 0.0, None)


def test_untrained_code_is_never_correct(manifest_of: MakeTable, pipeline_of: MakeTable) -> None:
    manifest = manifest_of([pair("a", codes=["K-1", "K-99"])])
    rows = [("a", [LEFT, RIGHT], [0.9, 0.8], [0, 1])]
    assert pipeline_metrics(manifest, pipeline_of(rows), CLASSES)["pill_accuracy"] == 0.5


def test_metrics_are_none_without_combination_photos(manifest_of: MakeTable, pipeline_of: MakeTable) -> None:
    manifest = manifest_of([{"sample_id": "single", "codes": ["K-1"], "boxes": [LEFT]}])
    metrics = pipeline_metrics(manifest, pipeline_of([]), CLASSES)
    assert (metrics["pill_accuracy"], metrics["photo_accuracy"], metrics["num_photos"]) == (None, None, 0)


def test_pill_without_an_answer_is_found_and_not_named(manifest_of: MakeTable, pipeline_of: MakeTable) -> None:
    table = pipeline_of([("a", [LEFT, RIGHT], [0.9, 0.8], [0, 1])])
    column = table.schema.get_field_index("probs")
    table = table.set_column(column, table.schema.field(column), pa.array([[0.9, 0.0]], pa.list_(pa.float32())))
    metrics = pipeline_metrics(manifest_of([pair("a")]), table, CLASSES)
    assert (metrics["detected"], metrics["pill_accuracy"]) == (1.0, 0.5)
