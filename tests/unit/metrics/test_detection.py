from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks.average_precision import pycocotools_precision
from pillsnap.metrics.detection import detection_metrics, match_detections
from tests.unit.conftest import MakeTable

# ultralytics' interpolation ends the curve at precision 0, which costs half of the last of 100 steps.
PERFECT = 0.995
BOX = [10, 10, 20, 20]


def photos(count: int, **fields: Any) -> list[dict]:
    return [{"sample_id": f"p{i}", "codes": ["K-1"], "boxes": [BOX], **fields} for i in range(count)]


def test_perfect_detection(manifest_of: MakeTable, detections_of: MakeTable) -> None:
    metrics = detection_metrics(manifest_of(photos(4)), detections_of([(f"p{i}", [BOX], [0.9]) for i in range(4)]))
    assert metrics["map50"] == pytest.approx(PERFECT)
    assert metrics["map50_95"] == pytest.approx(PERFECT)
    assert (metrics["precision"], metrics["recall"]) == pytest.approx((1.0, 1.0))
    assert (metrics["num_photos"], metrics["num_boxes"], metrics["num_photos_left_out"]) == (4, 4, 0)


def test_one_missed_pill_of_four_gives_recall_three_quarters(manifest_of: MakeTable, detections_of: MakeTable) -> None:
    rows = [(f"p{i}", [BOX], [0.9]) for i in range(3)] + [("p3", [], [])]
    metrics = detection_metrics(manifest_of(photos(4)), detections_of(rows))
    assert metrics["recall"] == pytest.approx(0.75)
    assert metrics["precision"] == pytest.approx(1.0)
    assert metrics["map50"] == pytest.approx(0.75, abs=0.01)


def test_duplicate_box_is_a_false_positive(manifest_of: MakeTable, detections_of: MakeTable) -> None:
    once = [("p0", [BOX], [0.9]), ("p1", [BOX], [0.9])]
    twice = [("p0", [BOX, BOX], [0.9, 0.9]), ("p1", [BOX, BOX], [0.9, 0.9])]
    manifest = manifest_of(photos(2))
    assert detection_metrics(manifest, detections_of(once))["precision"] == pytest.approx(1.0)
    metrics = detection_metrics(manifest, detections_of(twice))
    assert metrics["precision"] == pytest.approx(0.5)
    assert metrics["recall"] == pytest.approx(1.0)


def test_box_of_iou_0_6_matches_three_of_ten_thresholds(manifest_of: MakeTable, detections_of: MakeTable) -> None:
    loose = [10, 10, 20, 12]  # IoU 0.6: correct at 0.50, 0.55 and 0.60
    metrics = detection_metrics(manifest_of(photos(2)), detections_of([(f"p{i}", [loose], [0.9]) for i in range(2)]))
    assert metrics["map50"] == pytest.approx(PERFECT)
    assert metrics["map50_95"] == pytest.approx(PERFECT * 3 / 10)


def test_nothing_detected(manifest_of: MakeTable, detections_of: MakeTable) -> None:
    metrics = detection_metrics(manifest_of(photos(3)), detections_of([(f"p{i}", [], []) for i in range(3)]))
    assert (metrics["map50"], metrics["precision"], metrics["recall"], metrics["num_boxes"]) == (0, 0, 0, 3)


def test_photos_with_incomplete_labels_are_left_out(manifest_of: MakeTable, detections_of: MakeTable) -> None:
    part = {"sample_id": "part", "codes": ["K-1", "K-2"], "boxes": [BOX, None]}
    rows = [("p0", [BOX], [0.5]), ("part", [BOX, [60, 60, 20, 20]], [0.9, 0.9])]
    metrics = detection_metrics(manifest_of([*photos(1), part]), detections_of(rows))
    assert (metrics["num_photos"], metrics["num_photos_left_out"], metrics["num_boxes"]) == (1, 1, 1)
    assert metrics["precision"] == pytest.approx(1.0)


def test_unreadable_photos_are_counted_and_not_evaluated(manifest_of: MakeTable, detections_of: MakeTable) -> None:
    metrics = detection_metrics(manifest_of(photos(2)), detections_of([("p0", [BOX], [0.9])]))
    assert (metrics["num_photos"], metrics["num_photos_unread"]) == (1, 1)
    assert metrics["recall"] == pytest.approx(1.0)


def test_only_the_given_split_is_evaluated(manifest_of: MakeTable, detections_of: MakeTable) -> None:
    manifest = manifest_of([*photos(1), {"sample_id": "t", "codes": ["K-1"], "boxes": [BOX], "split": "train"}])
    rows = detections_of([("p0", [BOX], [0.9]), ("t", [], [])])
    assert detection_metrics(manifest, rows)["num_boxes"] == 1
    assert detection_metrics(manifest, rows, split="train")["recall"] == 0


def test_metrics_are_none_without_a_label_box(manifest_of: MakeTable, detections_of: MakeTable) -> None:
    manifest = manifest_of([{"sample_id": "p0", "codes": ["K-1"], "boxes": [None]}])
    metrics = detection_metrics(manifest, detections_of([("p0", [BOX], [0.9])]))
    assert (metrics["map50"], metrics["num_photos"], metrics["num_photos_left_out"]) == (None, 0, 1)
    assert metrics["map50_coco"] is metrics["map50_95_coco"] is None


def test_matching_equals_ultralytics_validator() -> None:
    import torch
    from ultralytics.models.yolo.detect.val import DetectionValidator
    from ultralytics.utils.metrics import box_iou

    validator = DetectionValidator.__new__(DetectionValidator)
    validator.iouv = torch.linspace(0.5, 0.95, 10)
    rng = np.random.default_rng(5)
    for _ in range(20):
        labels, predictions, _ = random_photo(rng)
        corners = [torch.tensor(np.c_[box[:, :2], box[:, :2] + box[:, 2:]]) for box in (labels, predictions)]
        zeros = [torch.zeros(len(predictions)), torch.zeros(len(labels))]
        theirs = validator.match_predictions(*zeros, box_iou(*corners)).numpy()
        assert (match_detections(labels, predictions) == theirs).all()


def random_photo(rng: np.random.Generator, spread_px: float = 6) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, predictions (jittered labels, duplicates, random boxes; best score first) and distinct scores."""
    count = int(rng.integers(1, 5))
    labels = np.c_[rng.uniform(0, 700, (count, 2)), rng.uniform(100, 250, (count, 2))].astype(np.float32)
    kept = labels[rng.random(count) < 0.85]
    jittered = [kept + rng.normal(0, spread, kept.shape) for spread in (spread_px, 3 * spread_px)]
    random_boxes = np.c_[rng.uniform(0, 700, (2, 2)), rng.uniform(100, 250, (2, 2))]
    predictions = np.concatenate([*jittered, random_boxes]).astype(np.float32)
    predictions[:, 2:] = np.maximum(predictions[:, 2:], 1)
    scores = np.concatenate([rng.beta(5, 2, len(kept)), rng.beta(2, 4, len(predictions) - len(kept))])
    order = np.argsort(-scores)
    return labels, predictions[order], scores[order]


@pytest.mark.parametrize(("spread_px", "least_map50"), [(6, 0.7), (15, 0.55), (30, 0.2)])
def test_average_precision_agrees_with_pycocotools(
    manifest_of: MakeTable, detections_of: MakeTable, spread_px: float, least_map50: float
) -> None:
    """Same matching, different quadrature: COCO takes the mean of 101 points, ultralytics the trapezoids between them.

    The trapezoids give half the weight to both ends of the curve. For a curve that falls from 1 to 0 the difference is
    AP / 100 - 0.005, at most 0.002 for an AP of 0.3 to 0.7; corrected for it, both agree everywhere.
    """
    rng = np.random.default_rng(11)
    rows, found, annotations, results = [], [], [], []
    for number in range(250):
        labels, predictions, scores = random_photo(rng, spread_px)
        rows.append({"sample_id": f"p{number}", "codes": ["K-1"] * len(labels), "boxes": labels.tolist()})
        found.append((f"p{number}", predictions.tolist(), scores.tolist()))
        annotations += [{"image_id": number, "bbox": box} for box in labels.tolist()]
        results += [
            {"image_id": number, "category_id": 1, "bbox": box, "score": float(np.float32(score))}
            for box, score in zip(predictions.tolist(), scores.tolist(), strict=True)
        ]
    metrics = detection_metrics(manifest_of(rows), detections_of(found))
    coco_map50_95, coco_map50 = pycocotools_precision(annotations, results, num_photos=250)
    assert metrics["map50_coco"] == pytest.approx(coco_map50, abs=1e-9)
    assert metrics["map50_95_coco"] == pytest.approx(coco_map50_95, abs=1e-9)
    assert least_map50 < metrics["map50"] < least_map50 + 0.2
    ends = metrics["pr_curve"]["precision"][0] + metrics["pr_curve"]["precision"][-1]
    assert metrics["map50"] == pytest.approx((101 * coco_map50 - ends / 2) / 100, abs=0.001)
    for ours, coco in ((metrics["map50"], coco_map50), (metrics["map50_95"], coco_map50_95)):
        if 0.3 < coco < 0.7:
            assert ours == pytest.approx(coco, abs=0.002)


def test_coco_counts_100_boxes_per_photo_and_matches_ties_as_pycocotools_does(
    manifest_of: MakeTable, detections_of: MakeTable
) -> None:
    rng = np.random.default_rng(4)
    rows, found, annotations, results = [], [], [], []
    for number in range(6):
        labels = [[10, 10, 40, 40], [10, 10, 40, 40], [120, 10, 30, 30]][: 1 + number % 3]
        corners = rng.integers(0, 12, (130, 2)) * 10
        boxes = np.concatenate([[[10, 10, 40, 40]], np.c_[corners, rng.integers(2, 5, (130, 2)) * 10]]).tolist()
        scores = np.sort(rng.permutation(1000)[:131] / 1000)[::-1].tolist()
        rows.append({"sample_id": f"p{number}", "codes": ["K-1"] * len(labels), "boxes": labels})
        found.append((f"p{number}", boxes, scores))
        annotations += [{"image_id": number, "bbox": box} for box in labels]
        results += [
            {"image_id": number, "category_id": 1, "bbox": box, "score": float(np.float32(score))}
            for box, score in zip(boxes, scores, strict=True)
        ]
    metrics = detection_metrics(manifest_of(rows), detections_of(found))
    coco_map50_95, coco_map50 = pycocotools_precision(annotations, results, num_photos=6)
    assert 0.05 < coco_map50_95 < coco_map50 < 0.95
    assert (metrics["map50_coco"], metrics["map50_95_coco"]) == pytest.approx((coco_map50, coco_map50_95), abs=1e-9)


def test_coco_precision_is_zero_without_a_detection(manifest_of: MakeTable, detections_of: MakeTable) -> None:
    metrics = detection_metrics(manifest_of(photos(2)), detections_of([("p0", [], []), ("p1", [], [])]))
    assert (metrics["map50_coco"], metrics["map50_95_coco"]) == (0.0, 0.0)


def test_precision_recall_curve_falls_to_zero_after_the_last_recall(
    manifest_of: MakeTable, detections_of: MakeTable
) -> None:
    rows = [(f"p{i}", [BOX], [0.9]) for i in range(2)] + [("p2", [], []), ("p3", [], [])]
    curve = detection_metrics(manifest_of(photos(4)), detections_of(rows))["pr_curve"]
    assert len(curve["recall"]) == len(curve["precision"]) == 101
    at = dict(zip(curve["recall"], curve["precision"], strict=True))
    assert at[0.0] == 1.0
    assert at[min(at, key=lambda recall: abs(recall - 0.45))] == 1.0
    assert at[min(at, key=lambda recall: abs(recall - 0.6))] == 0.0
