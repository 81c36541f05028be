from __future__ import annotations

import numpy as np
import pytest

from pillsnap.metrics.classification import (
    classification_metrics,
    confused_pairs,
    confusion_matrix,
    macro_f1,
    per_class,
)
from tests.unit.conftest import MakeTable

CLASSES = ["K-1", "K-2", "K-3", "K-4"]


def test_classification_by_hand(crops_of: MakeTable) -> None:
    table = crops_of(
        labels=[0, 1, 2, 3],
        top=[[0, 1], [1, 0], [2, 1], [1, 3]],
        image_types=["single", "single", "combination", "combination"],
    )
    metrics = classification_metrics(table, CLASSES)
    assert (metrics["top1"], metrics["top5"], metrics["num_samples"]) == (0.75, 1.0, 4)
    assert metrics["single"] == {"top1": 1.0, "top5": 1.0, "macro_f1": 1.0, "num_samples": 2}
    assert metrics["combination"]["top1"] == 0.5
    # F1: K-1 1, K-2 2/3 (one false positive), K-3 1, K-4 0
    assert metrics["macro_f1"] == pytest.approx((1 + 2 / 3 + 1 + 0) / 4)
    assert metrics["confused_pairs"] == [{"true": "K-4", "predicted": "K-2", "count": 1, "n": 1}]


def test_classes_that_are_not_in_the_split_do_not_count(crops_of: MakeTable) -> None:
    metrics = classification_metrics(crops_of([0, 2], [[0], [2]]), CLASSES)
    assert (metrics["top1"], metrics["macro_f1"], metrics["num_classes"]) == (1.0, 1.0, 4)


def test_predicted_class_without_a_label_lowers_macro_f1() -> None:
    assert macro_f1(np.array([0, 0, 1]), np.array([0, 2, 1]), 4) == pytest.approx((2 / 3 + 1 + 0) / 3)


def test_macro_f1_is_the_mean_of_each_class_s_f1() -> None:
    rng = np.random.default_rng(2)
    labels, predicted = rng.integers(0, 7, 60), rng.integers(0, 9, 60)
    scores = []
    for number in range(9):
        hits = sum(label == guess == number for label, guess in zip(labels, predicted, strict=True))
        recall, precision = hits / max((labels == number).sum(), 1), hits / max((predicted == number).sum(), 1)
        scores.append(2 * recall * precision / (recall + precision) if hits else 0.0)
    assert macro_f1(labels, predicted, 12) == pytest.approx(sum(scores) / 9)


def test_crop_of_an_untrained_class_is_counted_as_a_mistake(crops_of: MakeTable) -> None:
    metrics = classification_metrics(crops_of([0, -1], [[0], [0]]), CLASSES)
    assert (metrics["top1"], metrics["num_unknown_class"]) == (0.5, 1)
    assert metrics["macro_f1"] == pytest.approx(2 / 3)


def test_metrics_are_none_without_crops(crops_of: MakeTable) -> None:
    metrics = classification_metrics(crops_of([], []), CLASSES)
    assert (metrics["top1"], metrics["macro_f1"], metrics["num_samples"]) == (None, None, 0)
    assert metrics["calibration"]["ece"] is None


def test_per_class_by_hand() -> None:
    rows = per_class(np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1]), ["a", "b", "c"])
    assert rows[0] == {"code": "a", "n": 3, "precision": 1.0, "recall": pytest.approx(2 / 3), "f1": pytest.approx(0.8)}
    assert rows[1] == {"code": "b", "n": 1, "precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3)}
    assert rows[2] == {"code": "c", "n": 0, "precision": None, "recall": None, "f1": None}


def test_confused_pairs_are_counted_and_sorted() -> None:
    pairs = confused_pairs(np.array([0, 0, 0, 1, 1]), np.array([1, 1, 0, 2, 1]), ["a", "b", "c"])
    assert pairs == [
        {"true": "a", "predicted": "b", "count": 2, "n": 3},
        {"true": "b", "predicted": "c", "count": 1, "n": 2},
    ]


def test_confusion_matrix_has_true_rows_and_predicted_columns() -> None:
    matrix = confusion_matrix(np.array([0, 0, 1, -1]), np.array([1, 1, 1, 0]), 2)
    assert matrix.tolist() == [[0, 2], [0, 1]]


def test_crop_without_an_answer_is_a_mistake(crops_of: MakeTable) -> None:
    """Its logits were not finite: the probabilities are 0, whatever the indices say."""
    table = crops_of([0, 1, -1], [[0, 1], [1, 0], [0, 1]], [[0.9, 0.1], [0.0, 0.0], [0.0, 0.0]])
    metrics = classification_metrics(table, CLASSES)
    assert metrics["top1"] == metrics["top5"] == pytest.approx(1 / 3)
    assert metrics["calibration"]["accuracy"][0] == 0.0 and metrics["calibration"]["count"][0] == 2
