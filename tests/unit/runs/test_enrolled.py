"""The file of enrolled drugs: what is written is read, what is removed leaves no trace, damage is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pillsnap.errors import UserError
from pillsnap.manifest.table import ClassInfo
from pillsnap.runs.enrolled import ENROLLED_FILE, Enrolled, read_enrolled, write_enrolled

NONE = Enrolled.none(5, "ab" * 32)
DRUGS = [ClassInfo(f"K-{i}", 0, f"약 {i}", ["1"], num_train=i, attributes={"shape": "원형"}) for i in range(4)]


def with_drugs(*numbers: int) -> Enrolled:
    """Each lowers all drugs by a quarter of its number."""
    enrolled = NONE
    for number in numbers:
        rows = np.full((number, 5), number / 3)
        enrolled = enrolled.with_drug(DRUGS[number], rows, -np.arange(1, number + 1) / 7, number / 4)
    return enrolled


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert read_enrolled(tmp_path) is None
    write_enrolled(tmp_path, with_drugs(2, 1))
    found = read_enrolled(tmp_path)
    assert found is not None and found.classes == [DRUGS[2], DRUGS[1]] and found.model == NONE.model
    assert found.weight.dtype == found.bias.dtype == np.float32
    assert found.weight.tolist() == [[np.float32(2 / 3)] * 5] * 2 + [[np.float32(1 / 3)] * 5]
    assert found.bias.tolist() == [np.float32(-1 / 7), np.float32(-2 / 7), np.float32(-1 / 7)]
    # Two rows of one drug and one of the other: the highest counts.
    weight, bias = found.padded
    assert weight.shape == (2, 2, 5)
    np.testing.assert_allclose(bias + 0.5, [[-1 / 7, -2 / 7], [-1 / 7, -1 / 7]], rtol=1e-6)
    logits = [10 / 3 - 1 / 7 - 0.5, 5 / 3 - 1 / 7 - 0.5]
    assert found.logits(np.ones((1, 5), np.float32))[0].tolist() == pytest.approx(logits)
    assert NONE.logits(np.ones((3, 5), np.float32)).shape == (3, 0)


def test_removing_a_drug_leaves_the_bytes_of_before(tmp_path: Path) -> None:
    path = tmp_path / ENROLLED_FILE
    write_enrolled(tmp_path, with_drugs(1, 3))
    before = path.read_bytes()
    write_enrolled(tmp_path, with_drugs(1, 2, 3))
    assert path.read_bytes() != before
    found = read_enrolled(tmp_path)
    assert found is not None
    write_enrolled(tmp_path, found.without("K-2"))
    assert path.read_bytes() == before
    write_enrolled(tmp_path, found.without("K-2").without("K-1").without("K-3"))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="K-9 is not enrolled; enrolled are: K-1, K-2, K-3"):
        found.without("K-9")


def test_rows_of_other_weights_are_refused() -> None:
    with_drugs(1).require("ab" * 32, "runs/a")
    with pytest.raises(UserError, match=r"runs/a were enrolled with other weights.*--remove CODE.*K-1, K-3"):
        with_drugs(1, 3).require("cd" * 32, "runs/a")


@pytest.mark.parametrize("damage", ["cut", "text", "rows", "class"])
def test_damage_is_named(tmp_path: Path, damage: str) -> None:
    good = with_drugs(1, 2)
    if damage == "rows":
        good = replace(good, weight=good.weight[:1])
    write_enrolled(tmp_path, good)
    data = (tmp_path / ENROLLED_FILE).read_bytes()
    broken = {"cut": data[:-9], "text": b"drugs", "rows": data, "class": data.replace(b"edi_codes", b"edi_c0des")}
    (tmp_path / ENROLLED_FILE).write_bytes(broken[damage])
    with pytest.raises(UserError, match=rf"{ENROLLED_FILE}: not a file of enrolled drugs"):
        read_enrolled(tmp_path)
