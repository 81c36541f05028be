"""Packing: unpacked windows and bad photos equal the packed ones, in order."""

from __future__ import annotations

import numpy as np

from pillsnap.data import packing
from pillsnap.data.plan import Slot
from pillsnap.data.windows import EncodedWindow
from pillsnap.photos.decode import BadImage


def slot_of(step: int, members: list[int]) -> Slot:
    return Slot(0, True, step, np.array(members, int), np.zeros(len(members), int))


def test_windows_and_bad_photos_come_back_in_order() -> None:
    windows = {
        3: EncodedWindow(b"three", 1.0, 2.0, 0.5, 0.25),
        5: BadImage("truncated", "cut at 뒤"),
        7: EncodedWindow(b"", own=False),
        9: EncodedWindow(b"nine", 3.0, 4.0),
        11: None,  # the store has it
    }
    slots = {
        10: slot_of(0, [3, 5]),
        12: slot_of(1, [7, 11, 9, 3]),
        14: slot_of(2, []),
    }
    packed = packing.pack(slots, lambda slot, member: windows[member])
    row = {name: np.asarray(value)[None] for name, value in packed.items()}
    assert row["slots"][0].tolist() == [10, 12, 14]
    for found, member in zip(packing.unpack(row), [3, 5, 7, 11, 9, 3], strict=True):
        expected = windows[member]
        if expected is None:
            assert found is None
        elif isinstance(expected, BadImage):
            assert isinstance(found, BadImage)
            assert (found.reason, found.detail) == (expected.reason, expected.detail)
        else:
            assert isinstance(found, EncodedWindow)
            assert (bytes(found.data), found.left, found.top, found.scale_x, found.scale_y, found.own) == (
                expected.data, expected.left, expected.top, expected.scale_x, expected.scale_y, expected.own,
            )  # fmt: skip


def test_row_of_bad_photos_only() -> None:
    slot = slot_of(0, [1, 2])
    packed = packing.pack({0: slot}, lambda slot, member: BadImage("missing", str(member)))
    row = {name: np.asarray(value)[None] for name, value in packed.items()}
    assert [str(found) for found in packing.unpack(row)] == ["missing: 1", "missing: 2"]
