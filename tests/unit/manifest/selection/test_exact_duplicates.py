"""Byte-identical photos are found by fingerprint, then confirmed by their whole content."""

from __future__ import annotations

from pathlib import Path

import pytest

from pillsnap.manifest.selection import exact_duplicates
from pillsnap.manifest.selection.exact_duplicates import find_exact_duplicates, group_equal

PNG = b"\x89PNG\r\n\x1a\n"


def test_equal_fingerprints_are_grouped_in_order_without_empty_ones() -> None:
    assert group_equal([b"a", b"", b"b", b"a", b"", b"b", b"c"]) == [[0, 3], [2, 5]]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_photos_with_equal_ends_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int) -> None:
    monkeypatch.setattr(exact_duplicates, "_PROCESSES_FROM", 2)
    monkeypatch.setattr(exact_duplicates, "_CHUNK", 2)
    middles = [b"1", b"2", b"1", b"3", b"2", b"1"]
    for number, middle in enumerate(middles):  # equal ends and sizes
        (tmp_path / f"{number}.png").write_bytes(PNG + bytes(6000) + middle + bytes(6000))
    (tmp_path / "6.png").write_bytes(b"no photo")
    (tmp_path / "7.png").write_bytes(b"no photo")
    (tmp_path / "8.png").symlink_to(tmp_path / "0.png")
    calls = []
    paths = [*(f"{number}.png" for number in range(9)), "missing.png", "../x.png"]
    found = find_exact_duplicates(str(tmp_path), paths, num_workers, lambda *call: calls.append(call))
    assert found == [[0, 2, 5], [1, 4]]
    assert calls[-1] == ("duplicates", 11, 11)
