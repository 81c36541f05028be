"""Which photos show the two sides of one pill."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pillsnap.errors import UserError
from pillsnap.evaluate import both_sides
from pillsnap.evaluate.both_sides import manifest_pairs, pairs_of, side_pairs
from tests.unit.conftest import build_manifest

BOX = [0.0, 0.0, 10.0, 10.0]


def test_names_tell_front_and_back() -> None:
    names = [
        "a/12_back.JPG", "a/K-000001_0_2_0_0_75_260_200.png", "a/12_front.jpg", "b/12_front.jpg", "a/7 앞면.png",
        "a/K-000001_0_2_1_0_75_260_200.png", "a/7-뒷면.png", "a/K-000001_0_2_1_0_90_260_200.png", "a/other.png",
    ]  # fmt: skip
    assert pairs_of(names, "name") == [(1, 5), (2, 0), (4, 6)]
    # Two fronts of one name: which belongs to the back is not known.
    assert pairs_of([*names, "a/12-F.png"], "name") == [(1, 5), (4, 6)]
    with pytest.raises(UserError, match=r"12_front\.jpg and 12_back\.jpg"):
        pairs_of(["x.png", "y.png"], "name")


def test_photos_in_turn_are_pairs() -> None:
    assert pairs_of(["x", "y", "z", "w"], "order") == [(0, 1), (2, 3)]
    with pytest.raises(UserError, match="even number of photos, front and back in turn: 3 given"):
        pairs_of(["x", "y", "z"], "order")


def row(name: str, code: str, direction: int | None, light: int = 0, **other: Any) -> dict[str, Any]:
    return {"sample_id": name, "codes": [code], "boxes": [BOX], "direction": direction, "light": light} | other


def test_each_photo_of_a_manifest_is_in_one_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    photos = build_manifest(
        [
            row("a1", "A", 0, light=1), row("a0", "A", 0), row("a2", "A", 1, light=2), row("a3", "A", 1),
            row("a4", "A", 1, light=1), row("b0", "B", 0), row("c0", "C", None), row("d0", "D", 0), row("d1", "D", 1),
            row("e0", "A", 0, boxes=[None]), row("f", "A", 0, codes=["A", "B"], boxes=[BOX, BOX]),
        ]
    )  # fmt: skip
    assert manifest_pairs(photos, ["A", "B", "C"]) == [("a0", "a3"), ("a1", "a4")]
    assert manifest_pairs(photos, ["A", "D"]) == [("a0", "a3"), ("a1", "a4"), ("d0", "d1")]
    monkeypatch.setattr(both_sides, "MAX_PAIRS", 2)
    assert manifest_pairs(photos, ["A", "D"]) == [("a0", "a3"), ("a1", "a4")]


def test_pairs_are_read_at_the_temperature() -> None:
    def found(name: str, logits: list[float], label: int) -> dict[str, Any]:
        data = np.array(logits, np.float32).tobytes()
        return {"sample_id": name, "label": [label], "logits": [data], "temperature": 2.0}

    rows = [found("b", [0, 6], 1), found("a", [2, 0], 1), found("c", [np.nan, 1], 0), found("d", [4, 0], 0),
            {"sample_id": "e", "label": None}]  # fmt: skip
    pairs = side_pairs(rows, [("a", "b"), ("c", "d"), ("d", "e"), ("x", "y")])
    assert pairs is not None and pairs.labels.tolist() == [1, 0]
    assert pairs.front.tolist() == [[1, 0], [0, 0]] and pairs.back.tolist() == [[0, 3], [2, 0]]
    assert side_pairs(rows, [("x", "y")]) is None
