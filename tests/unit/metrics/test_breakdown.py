"""Accuracy by dispensing counts and by attributes, on answers that are counted by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from pillsnap.errors import UserError
from pillsnap.evaluate.dispensed import read_counts
from pillsnap.metrics.breakdown import attribute_accuracy, weighted_accuracy
from tests.unit.conftest import build_crops

CODES = ["K-1", "K-2", "K-3", "K-4"]
# K-1: 3 of 4 right, and all among the first five; K-2: 1 of 2; K-3: 0 of 1; K-4 has no crop; -1 was not trained.
CROPS = build_crops([0, 0, 0, 0, 1, 1, 2, -1], [[0, 1], [0, 1], [0, 1], [1, 0], [1, 0], [3, 0], [0, 1], [0, 1]])


def test_accuracy_is_weighted_by_counts() -> None:
    found = weighted_accuracy(CROPS, CODES, {"K-1": 60, "K-2": 20, "K-4": 10, "K-9": 10})
    assert found == {
        "top1": pytest.approx((60 * 3 / 4 + 20 / 2) / 80), "top5": pytest.approx((60 + 20 / 2) / 80),
        "num_classes": 2, "covered": pytest.approx(0.8),
    }  # fmt: skip
    assert weighted_accuracy(CROPS, CODES, {"K-4": 1}) == {"top1": None, "top5": None, "num_classes": 0, "covered": 0}


def test_accuracy_by_attribute() -> None:
    attributes = [
        {"shape": "원형", "colours": ["하양"], "imprint_front": "A", "imprint_back": "B"},
        {"shape": "round", "colours": ["white"], "imprint_back": "C"},
        {"shape": "장방형", "colours": ["하양", "파랑"], "imprint_front": "마크"},
        {"shape": "팔각형"},
    ]
    found = attribute_accuracy(CROPS, attributes)
    assert [(row["value"], row["num_classes"], row["num_samples"]) for row in found["shape"]] == [
        ("원형", 2, 6), ("장방형", 1, 1),
    ]  # fmt: skip
    assert [row["top1"] for row in found["shape"]] == [pytest.approx(4 / 6), 0.0]
    assert [(row["value"], row["num_samples"]) for row in found["colour"]] == [("하양", 7), ("파랑", 1)]
    assert {row["value"]: row["top1"] for row in found["imprint"]} == {
        "both sides": 0.75, "one side": 0.5, "none known": 0.0,
    }  # fmt: skip
    assert [(row["value"], row["top5"]) for row in found["look"]] == [("원형 하양", pytest.approx(5 / 6))]
    assert attribute_accuracy(CROPS, [{}] * 4) == {}


def test_counts_of_a_table(tmp_path: Path) -> None:
    path = tmp_path / "counts.csv"
    path.write_text('code,count,year\nK-1,"1,200",2024\nK-9,0.5,2024\n', encoding="utf-8")
    assert read_counts(path, CODES) == {"K-1": 1200, "K-9": 0.5}
    for text, message in (
        ("code,count\nK-1,-1", "row 2: the count of K-1 is '-1', not a number of 0 or more"),
        ("code,count\nK-1,x", "row 2: the count of K-1 is 'x'"),
        ("code,count\nK-1,1\nK-1,2", "row 3: K-1 has the count 2, but 1 in a row above; keep one"),
        ("code,count\nK-9,1\nK-1,0", "no class has a count above 0; the classes are like 'K-1'"),
        ("code,number\nK-9,1", "row 1: the columns are code, number; expected `code` and some of count"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=message):
            read_counts(path, CODES)
