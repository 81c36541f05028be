"""Labels of plain boxes, parsed at once, give what parsing row by row gives, or the same error."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pillsnap.errors import UserError
from pillsnap.manifest.formats import label_rows
from pillsnap.manifest.formats.label_rows import Pills, read_pills
from pillsnap.manifest.formats.reading import Read

NUMBERS = st.floats(0.01, 1.9).map(repr) | st.sampled_from(["0.5", ".5", "5e-1", "+0.5", "1", "00.250"])
PLAIN = st.tuples(st.sampled_from(["0", "1", "2.0", "+1", "0e0"]), NUMBERS, NUMBERS, NUMBERS, NUMBERS).map(list)
ODD_ROWS = [
    "0 0.5 0.5 0.2", "0 0.5 0.5 0.2 0.1 0.9", "3 0.5 0.5 0.2 0.1", "-1 0.5 0.5 0.2 0.1", "0.5 0.5 0.5 0.2 0.1",
    "0 0.5 0.5 0 0.1", "0 0.5 0.5 0.2 -0.1", "0 2.5 0.5 0.2 0.1", "0 0.5 0.5 1e999 0.1", "0 0.5 0.5 nan 0.1",
    "0 0.5 0.5 0.2 1e", "0 0.5 0.5 0.2 0,1", "x 0.5 0.5 0.2 0.1", "0 0.5 0.5 0.2\n0.1", "\ufeff0 0.5 0.5 0.2 0.1",
    "0 0.5 0.5 0.2 0.1\r1 0.5 0.5 0.2 0.1", "0 0.5 0.5 0.2 0.1\x0c1 0.5 0.5 0.2 0.1", "0 0.1 0.1 0.3 0.2 0.2 0.5",
    "0 0.5 0.5 0.2 0.1\x00", "0\u00a00.5 0.5 0.2 0.1", "0 0.5 0.5 1_0 0.1",
]  # fmt: skip
GAPS, ENDS = st.sampled_from([" ", "\t", "  "]), st.sampled_from(["\n", "\r\n", "\n\n", "", " \n"])


@st.composite
def labels(draw: st.DrawFn) -> bytes:
    rows = [draw(GAPS).join(row) for row in draw(st.lists(PLAIN, max_size=4))]
    return draw(ENDS).join(["", *rows, ""] if draw(st.booleans()) else rows).encode()


def result(texts: list[bytes], at_once: bool) -> list[Pills] | str:
    files = [f"{number}.txt" for number in range(len(texts))]
    reads = [Read("", 640 + number, 480, text) for number, text in enumerate(texts)]
    with pytest.MonkeyPatch.context() as patch:
        if not at_once:
            patch.setattr(label_rows, "_plain_pills", lambda *_: None)
        try:
            return read_pills(files, reads, 3, None, None)
        except UserError as error:
            return str(error)


@settings(max_examples=60, deadline=None)
@given(st.lists(labels(), max_size=5))
def test_plain_boxes_at_once_equal_those_row_by_row(texts: list[bytes]) -> None:
    assert result(texts, True) == result(texts, False)


@pytest.mark.parametrize("row", ODD_ROWS)
@pytest.mark.parametrize("before", [b"", b"0 0.5 0.5 0.2 0.1\n"])
def test_odd_rows_have_the_same_result_and_the_same_place(row: str, before: bytes) -> None:
    texts = [b"1 0.25 0.25 0.5 0.5\n", b"", before + row.encode() + b"\n", b"0 0.5 0.5 0.2 0.1"]
    found = result(texts, True)
    assert found == result(texts, False)
    assert not isinstance(found, str) or found.startswith(f"2.txt: line {2 if before else 1}")


def test_plain_boxes_are_not_parsed_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_rows, "_rows", lambda *_: pytest.fail("parsed row by row"))
    monkeypatch.setattr(label_rows, "_CHUNK", 2)
    texts = [b"1 0.25 0.25 0.5 0.5\r\n\r\n2.0 0.5 0.5 .1 1e-1", b"", b"\n", b"0 0.5 0.5 0.2 0.1\n"]
    expected = [[(1, (0.0, 0.0, 50.0, 100.0)), (2, (45.0, 90.0, 10.0, 20.0))], [], [], [(0, (40.0, 90.0, 20.0, 20.0))]]
    found = read_pills([""] * 4, [Read("", 100, 200, text) for text in texts], 3, None, None)
    assert [[index for index, _ in pills] for pills in found] == [[1, 2], [], [], [0]]
    for pills, wanted in zip(found, expected, strict=True):
        assert [box for _, box in pills] == [pytest.approx(box) for _, box in wanted]
