"""What a training checks before it starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from pillsnap.manifest.audit.quick import exceeds, reasons_not_to_train
from tests.unit.conftest import build_manifest


def rows(root: Path, **changes: Any) -> list[dict[str, Any]]:
    """Twelve photos of 20 x 10 pixels, each its own group; `changes` are made to the last."""
    made = []
    for number in range(12):
        cv2.imwrite(str(root / f"p{number}.png"), np.zeros((10, 20, 3), np.uint8))
        made.append({
            "sample_id": f"p{number}", "codes": ["a"], "boxes": [[1, 1, 5, 5]], "width": 20, "height": 10,
            "split": "val" if number > 8 else "train", **(changes if number == 11 else {}),
        })  # fmt: skip
    return made


def reasons(root: Path, made: list[dict[str, Any]]) -> list[str]:
    return reasons_not_to_train(build_manifest(made), str(root), 10_000, 0.01)


def test_good_manifest_may_train(tmp_path: Path) -> None:
    assert reasons(tmp_path, rows(tmp_path)) == []
    made = rows(tmp_path)
    (tmp_path / "p3.png").write_bytes(b"broken")  # left to the quarantine
    assert reasons(tmp_path, made) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "train"}, "no val photos"),
        ({"split": "val"}, "no train photos"),
        ({"width": 10, "height": 20}, "12 of 12 photos tried have another size .* the first p0.png \\(20 x 10\\)"),
    ],
)
def test_reasons_are_one_line_each(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    import re

    found = reasons(tmp_path, [row | change for row in rows(tmp_path)])
    assert any(re.search(message, line) for line in found), found


def test_group_on_both_sides(tmp_path: Path) -> None:
    (line,) = reasons(tmp_path, rows(tmp_path, group="p0"))
    assert line == "groups are in train and in another split: near-identical photos leak (1, the first p0)"


@pytest.mark.parametrize(
    ("count", "total", "expected"),
    [(0, 10, False), (1, 20, False), (2, 20, False), (3, 20, True), (3, 199, False), (7, 199, True), (1, 1, False)],
)
def test_few_bad_photos_prove_nothing(count: int, total: int, expected: bool) -> None:
    assert exceeds(count, total, 0.01) == expected
    assert exceeds(count, total, 0.0) == (count > 0)
