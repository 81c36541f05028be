from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from pillsnap.metrics.boxes import iou_xywh, list_arrays, match_boxes, read_boxes, read_photos
from tests.unit.conftest import MakeTable


def test_iou_by_hand() -> None:
    first = np.array([[0, 0, 10, 10], [0, 0, 0, 0]], np.float32)
    second = np.array([[0, 0, 10, 10], [5, 0, 10, 10], [20, 20, 5, 5], [np.nan] * 4], np.float32)
    assert iou_xywh(first, second) == pytest.approx(np.array([[1, 50 / 150, 0, 0], [0, 0, 0, 0]]))


def test_label_box_is_claimed_once_by_the_best_score() -> None:
    labels = np.array([[0, 0, 10, 10]], np.float32)
    predictions = np.array([[0, 0, 10, 9], [0, 0, 10, 10]], np.float32)
    assert match_boxes(labels, predictions).tolist() == [0, -1]


def test_prediction_takes_the_next_best_free_label() -> None:
    labels = np.array([[0, 0, 10, 10], [2, 0, 10, 10]], np.float32)
    predictions = np.array([[0, 0, 10, 10], [0, 0, 10, 10]], np.float32)
    assert match_boxes(labels, predictions).tolist() == [0, 1]


def test_overlap_of_exactly_one_half_matches() -> None:
    labels = np.array([[0, 0, 10, 10]], np.float32)
    assert match_boxes(labels, np.array([[0, 0, 10, 5]], np.float32)).tolist() == [0]
    assert match_boxes(labels, np.array([[0, 0, 10, 4.9]], np.float32)).tolist() == [-1]


def test_list_arrays_over_chunks_slices_and_empty_rows() -> None:
    nested = pa.list_(pa.list_(pa.float32()))
    first = pa.array([[[9, 9, 9, 9]], [[1, 2, 3, 4], [5, 6, 7, 8]], []], nested).slice(1)
    column = pa.chunked_array([first, pa.array([], nested), pa.array([[[0, 0, 1, 1]]], nested)])
    assert [array.tolist() for array in list_arrays(column)] == [[1, 2, 3, 4, 5, 6, 7, 8], [], [0, 0, 1, 1]]


def test_read_boxes_sorts_by_score(detections_of: MakeTable) -> None:
    table = detections_of([("a", [[0, 0, 1, 1], [0, 0, 2, 2]], [0.2, 0.7]), ("b", [], [])])
    boxes = read_boxes(table)
    assert boxes["a"].xywh.tolist() == [[0, 0, 2, 2], [0, 0, 1, 1]]
    assert boxes["a"].scores == pytest.approx([0.7, 0.2])
    assert boxes["a"].order.tolist() == [1, 0]
    assert boxes["b"].xywh.shape == (0, 4)


def test_photo_with_an_unlabelled_pill_is_incomplete(manifest_of: MakeTable) -> None:
    manifest = manifest_of(
        [
            {"sample_id": "whole", "codes": ["K-1", "K-2"], "boxes": [[0, 0, 5, 5], [9, 9, 5, 5]]},
            {"sample_id": "part", "codes": ["K-1", "K-2"], "boxes": [[0, 0, 5, 5], None]},
            {"sample_id": "trained", "codes": ["K-1"], "boxes": [None], "split": "train"},
        ]
    )
    photos = read_photos(manifest, "val")
    assert [(photo.sample_id, photo.complete) for photo in photos] == [("whole", True), ("part", False)]
