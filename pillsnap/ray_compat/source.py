"""The reads of a stream as a dataset, listed as needed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pillsnap.ray_compat import capabilities
from pillsnap.ray_compat.locality import NearWorkers
from pillsnap.ray_compat.reads import Reads

if TYPE_CHECKING:
    import pyarrow as pa
    from ray.data import Dataset


def reads_dataset(reads: Reads, near: NearWorkers | None = None) -> Dataset:
    """A dataset of one block per read, in order. `near` chooses the nodes of the tasks that take the blocks.

    Falls back to listing them in a task; Ray then places the tasks.
    """
    if capabilities.lazy_source():
        from pillsnap.ray_compat.lazy_source import lazy_dataset

        return lazy_dataset(reads, near if capabilities.locality() else None)
    import pyarrow as pa
    from ray.data import TaskPoolStrategy, from_arrow

    def list_reads(_: Any) -> Iterator[pa.Table]:
        yield from reads

    start = from_arrow(pa.table({"start": [0]}))
    # Ray Data merges two steps with equal resources into one task; one byte of memory keeps listing and reading apart.
    one_task = TaskPoolStrategy(size=1)
    return start.map_batches(list_reads, batch_size=None, num_cpus=0, memory=1, compute=one_task)
