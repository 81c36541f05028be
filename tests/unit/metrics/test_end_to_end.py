from __future__ import annotations

import pytest

from pillsnap.metrics.end_to_end import pipeline_metrics

CLASSES = ["K-1", "K-2", "K-3"]
LEFT, RIGHT, FAR = [0, 0, 20, 20], [50, 0, 20, 20], [80, 80, 10, 10]


def pair(sample_id: str, **fields) -> dict:
    return {"sample_id": sample_id, "codes": ["K-1", "K-2"], "boxes": [LEFT, RIGHT], **fields}


def test_every_pill_right(manifest_of, pipeline_of):
    figures = pipeline_metrics(
        manifest_of([pair("a")]), pipeline_of([("a", [RIGHT, LEFT], [0.9, 0.8], [1, 0])]), CLASSES
    )
    names = ("pill_accuracy", "photo_accuracy", "photo_accuracy_strict", "detected", "named_if_detected")
    assert [figures[name] for name in names] == [1.0] * 5
    assert (figures["num_pills"], figures["num_photos"], figures["surplus_per_photo"]) == (2, 1, 0.0)


def test_which_stage_loses_a_pill(manifest_of, pipeline_of):
    rows = [
        ("named", [LEFT, RIGHT], [0.9, 0.8], [0, 2]),  # found, one wrong name
        ("found", [LEFT], [0.9], [0]),  # one pill not found
    ]
    figures = pipeline_metrics(manifest_of([pair("named"), pair("found")]), pipeline_of(rows), CLASSES)
    assert figures["pill_accuracy"] == pytest.approx(2 / 4)
    assert figures["detected"] == pytest.approx(3 / 4)
    assert figures["named_if_detected"] == pytest.approx(2 / 3)
    assert figures["photo_accuracy"] == 0.0


def test_a_surplus_box_costs_only_the_strict_figure(manifest_of, pipeline_of):
    rows = [("a", [LEFT, RIGHT, FAR], [0.9, 0.8, 0.7], [0, 1, 2])]
    figures = pipeline_metrics(manifest_of([pair("a")]), pipeline_of(rows), CLASSES)
    assert (figures["photo_accuracy"], figures["photo_accuracy_strict"]) == (1.0, 0.0)
    assert figures["surplus_per_photo"] == 1.0


def test_the_better_score_claims_the_pill_whatever_its_name(manifest_of, pipeline_of):
    one = {"sample_id": "a", "codes": ["K-1"], "boxes": [LEFT], "image_type": "combination"}
    rows = [("a", [LEFT, LEFT], [0.4, 0.9], [0, 2])]  # the right name has the lower score
    assert pipeline_metrics(manifest_of([one]), pipeline_of(rows), CLASSES)["pill_accuracy"] == 0.0


def test_a_right_name_in_the_wrong_place_does_not_count(manifest_of, pipeline_of):
    rows = [("a", [FAR, RIGHT], [0.9, 0.8], [0, 1])]
    figures = pipeline_metrics(manifest_of([pair("a")]), pipeline_of(rows), CLASSES)
    assert figures["pill_accuracy"] == 0.5


def test_two_pills_of_one_code(manifest_of, pipeline_of):
    twins = pair("a", codes=["K-1", "K-1"])
    rows = [("a", [LEFT, RIGHT], [0.9, 0.8], [0, 0])]
    assert pipeline_metrics(manifest_of([twins]), pipeline_of(rows), CLASSES)["photo_accuracy"] == 1.0


def test_only_combination_photos_with_complete_labels_count(manifest_of, pipeline_of):
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
    figures = pipeline_metrics(manifest, pipeline_of(rows), CLASSES)
    assert (figures["num_photos"], figures["num_photos_left_out"], figures["num_photos_unread"]) == (1, 1, 1)
    assert (figures["pill_accuracy"], figures["detected"], figures["named_if_detected"]) == (0.0, 0.0, None)


def test_a_code_that_was_not_trained_cannot_be_right(manifest_of, pipeline_of):
    manifest = manifest_of([pair("a", codes=["K-1", "K-99"])])
    rows = [("a", [LEFT, RIGHT], [0.9, 0.8], [0, 1])]
    assert pipeline_metrics(manifest, pipeline_of(rows), CLASSES)["pill_accuracy"] == 0.5


def test_no_combination_photos(manifest_of, pipeline_of):
    manifest = manifest_of([{"sample_id": "single", "codes": ["K-1"], "boxes": [LEFT]}])
    figures = pipeline_metrics(manifest, pipeline_of([]), CLASSES)
    assert (figures["pill_accuracy"], figures["photo_accuracy"], figures["num_photos"]) == (None, None, 0)
