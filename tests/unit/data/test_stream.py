"""Reading a share of the stream: when its first row is requested, and what becomes of errors."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from pillsnap.data.stream import rows_of


class Share:
    """A share of a stream that records when it is read; an exception among its rows is raised."""

    def __init__(self, *rows: Any) -> None:
        self.rows, self.read = rows, threading.Event()

    def iter_batches(self, **_: Any) -> Iterator[Any]:
        self.read.set()
        for row in self.rows:
            if isinstance(row, Exception):
                raise row
            yield row


def test_the_first_row_is_requested_before_anybody_asks_for_it() -> None:
    share = Share({"step": 0}, {"step": 1}, {"step": 2})
    rows = rows_of(share)  # type: ignore[arg-type]
    assert share.read.wait(5)
    assert [row["step"] for row in rows] == [0, 1, 2]


@pytest.mark.parametrize("good", [0, 1, 2])
def test_an_error_of_the_stream_comes_at_its_row(good: int) -> None:
    rows = rows_of(Share(*({"step": step} for step in range(good)), OSError("no photo")))  # type: ignore[arg-type]
    assert [next(rows)["step"] for _ in range(good)] == list(range(good))
    with pytest.raises(OSError, match="no photo"):
        next(rows)


def test_a_stream_without_rows_ends() -> None:
    assert list(rows_of(Share())) == []  # type: ignore[arg-type]
