from __future__ import annotations

import numpy as np
import pytest

from benchmarks.average_precision import pycocotools_precision
from pillsnap.metrics.classification import (
    calibration,
    classification_metrics,
    confused_pairs,
    confusion_matrix,
    macro_f1,
    per_class,
)
from pillsnap.metrics.detection import detection_metrics, match_detections

# ultralytics' interpolation ends the precision-recall curve at precision 0, which costs half of the last of 100 steps.
PERFECT = 0.995
BOX = [10, 10, 20, 20]
CLASSES = ["K-1", "K-2", "K-3", "K-4"]


def photos(count: int, **fields) -> list[dict]:
    return [{"sample_id": f"p{i}", "codes": ["K-1"], "boxes": [BOX], **fields} for i in range(count)]


def test_perfect_detection(manifest_of, detections_of):
    figures = detection_metrics(manifest_of(photos(4)), detections_of([(f"p{i}", [BOX], [0.9]) for i in range(4)]))
    assert figures["map50"] == pytest.approx(PERFECT)
    assert figures["map50_95"] == pytest.approx(PERFECT)
    assert (figures["precision"], figures["recall"]) == pytest.approx((1.0, 1.0))
    assert (figures["num_photos"], figures["num_boxes"], figures["num_photos_left_out"]) == (4, 4, 0)


def test_one_pill_of_four_missed_gives_three_quarters(manifest_of, detections_of):
    rows = [(f"p{i}", [BOX], [0.9]) for i in range(3)] + [("p3", [], [])]
    figures = detection_metrics(manifest_of(photos(4)), detections_of(rows))
    assert figures["recall"] == pytest.approx(0.75)
    assert figures["precision"] == pytest.approx(1.0)
    assert figures["map50"] == pytest.approx(0.75, abs=0.01)


def test_a_second_box_on_a_found_pill_is_a_mistake(manifest_of, detections_of):
    once = [("p0", [BOX], [0.9]), ("p1", [BOX], [0.9])]
    twice = [("p0", [BOX, BOX], [0.9, 0.9]), ("p1", [BOX, BOX], [0.9, 0.9])]
    manifest = manifest_of(photos(2))
    assert detection_metrics(manifest, detections_of(once))["precision"] == pytest.approx(1.0)
    figures = detection_metrics(manifest, detections_of(twice))
    assert figures["precision"] == pytest.approx(0.5)
    assert figures["recall"] == pytest.approx(1.0)


def test_a_loose_box_counts_at_half_overlap_only(manifest_of, detections_of):
    loose = [10, 10, 20, 12]  # IoU 0.6: right at 0.50, 0.55 and 0.60
    figures = detection_metrics(manifest_of(photos(2)), detections_of([(f"p{i}", [loose], [0.9]) for i in range(2)]))
    assert figures["map50"] == pytest.approx(PERFECT)
    assert figures["map50_95"] == pytest.approx(PERFECT * 3 / 10)


def test_nothing_detected(manifest_of, detections_of):
    figures = detection_metrics(manifest_of(photos(3)), detections_of([(f"p{i}", [], []) for i in range(3)]))
    assert (figures["map50"], figures["precision"], figures["recall"], figures["num_boxes"]) == (0, 0, 0, 3)


def test_photos_with_incomplete_labels_are_left_out(manifest_of, detections_of):
    part = {"sample_id": "part", "codes": ["K-1", "K-2"], "boxes": [BOX, None]}
    rows = [("p0", [BOX], [0.5]), ("part", [BOX, [60, 60, 20, 20]], [0.9, 0.9])]
    figures = detection_metrics(manifest_of([*photos(1), part]), detections_of(rows))
    assert (figures["num_photos"], figures["num_photos_left_out"], figures["num_boxes"]) == (1, 1, 1)
    assert figures["precision"] == pytest.approx(1.0)


def test_photos_that_could_not_be_read_are_counted_and_not_judged(manifest_of, detections_of):
    figures = detection_metrics(manifest_of(photos(2)), detections_of([("p0", [BOX], [0.9])]))
    assert (figures["num_photos"], figures["num_photos_unread"]) == (1, 1)
    assert figures["recall"] == pytest.approx(1.0)


def test_only_the_asked_split_is_judged(manifest_of, detections_of):
    manifest = manifest_of([*photos(1), {"sample_id": "t", "codes": ["K-1"], "boxes": [BOX], "split": "train"}])
    rows = detections_of([("p0", [BOX], [0.9]), ("t", [], [])])
    assert detection_metrics(manifest, rows)["num_boxes"] == 1
    assert detection_metrics(manifest, rows, split="train")["recall"] == 0


def test_without_any_label_box_there_is_no_figure(manifest_of, detections_of):
    manifest = manifest_of([{"sample_id": "p0", "codes": ["K-1"], "boxes": [None]}])
    figures = detection_metrics(manifest, detections_of([("p0", [BOX], [0.9])]))
    assert (figures["map50"], figures["num_photos"], figures["num_photos_left_out"]) == (None, 0, 1)
    assert figures["map50_coco"] is figures["map50_95_coco"] is None


def test_matching_and_precision_are_those_of_ultralytics_own_validator():
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
    """Labels, predictions (jittered labels, twins and strays; best score first) and distinct scores."""
    count = int(rng.integers(1, 5))
    labels = np.c_[rng.uniform(0, 700, (count, 2)), rng.uniform(100, 250, (count, 2))].astype(np.float32)
    kept = labels[rng.random(count) < 0.85]
    jittered = [kept + rng.normal(0, spread, kept.shape) for spread in (spread_px, 3 * spread_px)]
    strays = np.c_[rng.uniform(0, 700, (2, 2)), rng.uniform(100, 250, (2, 2))]
    predictions = np.concatenate([*jittered, strays]).astype(np.float32)
    predictions[:, 2:] = np.maximum(predictions[:, 2:], 1)
    scores = np.concatenate([rng.beta(5, 2, len(kept)), rng.beta(2, 4, len(predictions) - len(kept))])
    order = np.argsort(-scores)
    return labels, predictions[order], scores[order]


@pytest.mark.parametrize(("spread_px", "least_map50"), [(6, 0.7), (15, 0.55), (30, 0.2)])
def test_average_precision_agrees_with_pycocotools(manifest_of, detections_of, spread_px, least_map50):
    """Same matching, other quadrature: COCO takes the mean of 101 points, ultralytics the trapezoids between them.

    The trapezoids give half the weight to the two ends of the curve. For one that falls from 1 to 0 that makes
    AP / 100 - 0.005, no more than 0.002 for an AP of 0.3 to 0.7; with it taken out the two have to agree everywhere.
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
    figures = detection_metrics(manifest_of(rows), detections_of(found))
    coco_map50_95, coco_map50 = pycocotools_precision(annotations, results, num_photos=250)
    assert figures["map50_coco"] == pytest.approx(coco_map50, abs=1e-9)
    assert figures["map50_95_coco"] == pytest.approx(coco_map50_95, abs=1e-9)
    assert least_map50 < figures["map50"] < least_map50 + 0.2
    ends = figures["pr_curve"]["precision"][0] + figures["pr_curve"]["precision"][-1]
    assert figures["map50"] == pytest.approx((101 * coco_map50 - ends / 2) / 100, abs=0.001)
    for ours, coco in ((figures["map50"], coco_map50), (figures["map50_95"], coco_map50_95)):
        if 0.3 < coco < 0.7:
            assert ours == pytest.approx(coco, abs=0.002)


def test_coco_counts_a_hundred_boxes_a_photo_and_gives_ties_to_the_last(manifest_of, detections_of):
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
    figures = detection_metrics(manifest_of(rows), detections_of(found))
    coco_map50_95, coco_map50 = pycocotools_precision(annotations, results, num_photos=6)
    assert 0.05 < coco_map50_95 < coco_map50 < 0.95
    assert (figures["map50_coco"], figures["map50_95_coco"]) == pytest.approx((coco_map50, coco_map50_95), abs=1e-9)


def test_precision_recall_curve_falls_from_one_to_the_last_recall(manifest_of, detections_of):
    rows = [(f"p{i}", [BOX], [0.9]) for i in range(2)] + [("p2", [], []), ("p3", [], [])]
    curve = detection_metrics(manifest_of(photos(4)), detections_of(rows))["pr_curve"]
    assert len(curve["recall"]) == len(curve["precision"]) == 101
    at = dict(zip(curve["recall"], curve["precision"], strict=True))
    assert at[0.0] == 1.0
    assert at[min(at, key=lambda recall: abs(recall - 0.45))] == 1.0
    assert at[min(at, key=lambda recall: abs(recall - 0.6))] == 0.0


def test_classification_by_hand(crops_of):
    table = crops_of(
        labels=[0, 1, 2, 3],
        top=[[0, 1], [1, 0], [2, 1], [1, 3]],
        image_types=["single", "single", "combination", "combination"],
    )
    figures = classification_metrics(table, CLASSES)
    assert (figures["top1"], figures["top5"], figures["num_samples"]) == (0.75, 1.0, 4)
    assert figures["single"] == {"top1": 1.0, "top5": 1.0, "macro_f1": 1.0, "num_samples": 2}
    assert figures["combination"]["top1"] == 0.5
    # F1: K-1 1, K-2 2/3 (one false positive), K-3 1, K-4 0
    assert figures["macro_f1"] == pytest.approx((1 + 2 / 3 + 1 + 0) / 4)
    assert figures["confused_pairs"] == [{"true": "K-4", "predicted": "K-2", "count": 1, "n": 1}]


def test_perfect_classification_ignores_classes_that_the_split_lacks(crops_of):
    figures = classification_metrics(crops_of([0, 2], [[0], [2]]), CLASSES)
    assert (figures["top1"], figures["macro_f1"], figures["num_classes"]) == (1.0, 1.0, 4)


def test_a_missing_class_that_is_predicted_costs_macro_f1():
    assert macro_f1(np.array([0, 0, 1]), np.array([0, 2, 1]), 4) == pytest.approx((2 / 3 + 1 + 0) / 3)


def test_macro_f1_is_torchmetrics_macro_average():
    import torch
    from torchmetrics.functional.classification import multiclass_f1_score

    rng = np.random.default_rng(2)
    labels, predicted = rng.integers(0, 7, 60), rng.integers(0, 9, 60)
    theirs = multiclass_f1_score(torch.tensor(predicted), torch.tensor(labels), num_classes=12, average="macro")
    assert macro_f1(labels, predicted, 12) == pytest.approx(float(theirs))


def test_a_crop_of_an_untrained_class_is_a_mistake_and_is_counted(crops_of):
    figures = classification_metrics(crops_of([0, -1], [[0], [0]]), CLASSES)
    assert (figures["top1"], figures["num_unknown_class"]) == (0.5, 1)
    assert figures["macro_f1"] == pytest.approx(2 / 3)


def test_no_crops_give_no_figures(crops_of):
    figures = classification_metrics(crops_of([], []), CLASSES)
    assert (figures["top1"], figures["macro_f1"], figures["num_samples"]) == (None, None, 0)
    assert figures["calibration"]["ece"] is None


def test_per_class_by_hand():
    rows = per_class(np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1]), ["a", "b", "c"])
    assert rows[0] == {"code": "a", "n": 3, "precision": 1.0, "recall": pytest.approx(2 / 3), "f1": pytest.approx(0.8)}
    assert rows[1] == {"code": "b", "n": 1, "precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3)}
    assert rows[2] == {"code": "c", "n": 0, "precision": None, "recall": None, "f1": None}


def test_confused_pairs_are_counted_and_sorted():
    pairs = confused_pairs(np.array([0, 0, 0, 1, 1]), np.array([1, 1, 0, 2, 1]), ["a", "b", "c"])
    assert pairs == [
        {"true": "a", "predicted": "b", "count": 2, "n": 3},
        {"true": "b", "predicted": "c", "count": 1, "n": 2},
    ]


def test_confusion_matrix_has_true_rows_and_predicted_columns():
    matrix = confusion_matrix(np.array([0, 0, 1, -1]), np.array([1, 1, 1, 0]), 2)
    assert matrix.tolist() == [[0, 2], [0, 1]]


def test_calibration_by_hand_and_by_torchmetrics():
    import torch
    from torchmetrics.functional.classification import binary_calibration_error

    # 0.95 twice with one right: gap 0.45; 0.55 once and right: gap 0.45.
    assert calibration(np.array([0.95, 0.95, 0.55]), np.array([1, 0, 1]))["ece"] == pytest.approx(0.45)
    rng = np.random.default_rng(3)
    confidence, right = rng.random(500), rng.integers(0, 2, 500)
    theirs = binary_calibration_error(torch.tensor(confidence), torch.tensor(right), n_bins=15, norm="l1")
    assert calibration(confidence, right)["ece"] == pytest.approx(float(theirs), abs=1e-6)
