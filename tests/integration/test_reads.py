"""Reads are listed as needed, in order and to the end, and none is made far ahead of the consumer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice, pairwise

import numpy as np
import pyarrow as pa
import pytest

from pillsnap.ray_compat.reads import Reads
from pillsnap.ray_compat.row_blocks import row_blocks
from pillsnap.ray_compat.source import reads_dataset

ROWS_AHEAD = 4


@pytest.fixture
def num_listed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry per read that was listed; the dataset is executed in this process."""
    listed: list[int] = []
    listing = Reads.__iter__

    def counting(reads: Reads) -> Iterator[pa.Table]:
        for block in listing(reads):
            listed.append(1)
            yield block

    monkeypatch.setattr(Reads, "__iter__", counting)
    return listed


def as_rows(read: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"first": read["first"], "length": read["end"] - read["first"]}


@pytest.mark.usefixtures("ray_local")
def test_all_reads_come_in_order_and_the_last_may_be_short(num_listed: list[int]) -> None:
    with row_blocks():
        dataset = reads_dataset(Reads(5, 1004, 3)).map_batches(as_rows, batch_size=None)
    rows = [(row["first"], row["length"]) for row in dataset.iter_rows()]
    assert rows == [(first, 3) for first in range(5, 1004, 3)]
    assert len(num_listed) == 333
    with row_blocks():
        short = reads_dataset(Reads(5, 10, 3)).map_batches(as_rows, batch_size=None)
    assert [row["length"] for row in short.iter_rows()] == [3, 2]


@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize(("end", "expected"), [(22, [2, 2, 2, 6, 5]), (11, [2, 2, 2]), (10, [2, 2, 1]), (6, [1])])
def test_the_first_reads_may_be_short(num_listed: list[int], end: int, expected: list[int]) -> None:
    with row_blocks():
        dataset = reads_dataset(Reads(5, end, 6, num_short=3, slots_per_short_read=2))
        made = dataset.map_batches(as_rows, batch_size=None)
    assert dataset.count() == len(expected)
    assert [row["length"] for row in made.iter_rows()] == expected


@pytest.mark.usefixtures("ray_local")
def test_a_long_stream_is_not_listed_before_it_is_read(num_listed: list[int]) -> None:
    with row_blocks(ROWS_AHEAD):
        dataset = reads_dataset(Reads(0, 10**9, 1)).map_batches(as_rows, batch_size=None)
    rows = dataset.iter_rows()
    assert [row["first"] for row in islice(rows, 100)] == list(range(100))
    assert len(num_listed) < 100 + 64 + 4 * ROWS_AHEAD
    del rows


@pytest.mark.usefixtures("ray_local")
def test_tasks_take_every_core_there_is() -> None:
    def nap(read: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        started_s = time.time()
        time.sleep(0.3)
        return {"started_s": np.array([started_s]), "ended_s": np.array([time.time()])}

    with row_blocks():
        dataset = reads_dataset(Reads(0, 1000, 1)).map_batches(nap, batch_size=None, num_cpus=1)
    rows = list(islice(dataset.iter_rows(), 16))
    overlapping = sum(after["started_s"] < before["ended_s"] for before, after in pairwise(rows))
    assert overlapping >= 4, "the source kept a core for itself"
