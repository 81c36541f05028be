"""A Ray Data source that makes its blocks when the reading has come near them.

Ray Data's own sources make all blocks before the first batch (132 s for 140,000 reads), and listing in a task costs a
process.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import ray
from ray.data import DataContext, Dataset
from ray.data._internal.execution.interfaces import BlockEntry, ExecutionOptions, RefBundle
from ray.data._internal.execution.operators.input_data_buffer import InputDataBuffer
from ray.data._internal.logical.interfaces import LogicalOperator, LogicalPlan, SourceOperator
from ray.data._internal.planner.planner import Planner
from ray.data._internal.stats import DatasetStats
from ray.data.block import BlockMetadata

from pillsnap.ray_compat.locality import NearWorkers
from pillsnap.ray_compat.patches import replaced
from pillsnap.ray_compat.reads import SCHEMA, Reads

_LISTED_AHEAD = 64
_KEPT = 1024
"""Blocks that stay in memory, because Ray may have to repeat tasks that took them; fewer are ever in progress."""


@dataclass(frozen=True, repr=False, eq=False)
class _ReadsSource(LogicalOperator, SourceOperator):
    """The logical operator: blocks of one row (first, end)."""

    reads: Reads
    near: NearWorkers | None
    _input_dependencies: list[LogicalOperator] = field(init=False, repr=False, default_factory=list)

    def output_data(self) -> None:
        """No blocks exist before the execution."""

    @property
    def num_outputs(self) -> int:
        """Number of blocks."""
        return self.reads.num_reads

    def infer_metadata(self) -> BlockMetadata:
        """Number of rows of all blocks."""
        return BlockMetadata(num_rows=self.reads.num_reads, size_bytes=None, input_files=None, exec_stats=None)

    def infer_schema(self) -> pa.Schema:
        """Two integers."""
        return SCHEMA


def lazy_dataset(reads: Reads, near: NearWorkers | None) -> Dataset:
    """A dataset of the reads; whichever process executes it must be within `planning_reads`."""
    context = DataContext.get_current().copy()
    plan = LogicalPlan(_ReadsSource(reads, near), context)
    return Dataset(plan, context, DatasetStats(metadata={}, parent=None))


@contextmanager
def planning_reads() -> Iterator[None]:
    """Let Ray Data plan datasets of reads in this process."""

    def plan(source: _ReadsSource, _: Any, context: DataContext) -> _ReadList:
        return _ReadList(context, source)

    with replaced((Planner, "_DEFAULT_PLAN_FNS", {**Planner._DEFAULT_PLAN_FNS, _ReadsSource: plan})):
        yield


class _ReadList(InputDataBuffer):
    """The physical operator."""

    def __init__(self, context: DataContext, source: _ReadsSource) -> None:
        self._near, self._num_reads, self._num_listed = source.near, source.reads.num_reads, 0
        self._unlisted = iter(source.reads)
        self._kept: deque[RefBundle] = deque(maxlen=_KEPT)
        super().__init__(context, input_data=[])
        self._estimated_num_output_bundles = self._estimated_num_output_rows = self._num_reads

    def start(self, options: ExecutionOptions, block_ref_counter: Any) -> None:
        (self._reader,) = self.output_dependencies
        if self._near is not None:
            self._near.place_tasks_of(self._reader)
        super().start(options, block_ref_counter)

    def throttling_disabled(self) -> bool:
        # It needs neither cores nor memory; Ray Data would reserve both for it.
        return True

    def has_execution_finished(self) -> bool:
        return self._num_listed >= self._num_reads

    def has_next(self) -> bool:
        ahead = self._num_listed - self._reader.metrics.num_inputs_received
        return self._num_listed < self._num_reads and ahead < _LISTED_AHEAD

    def _get_next_inner(self) -> RefBundle:
        block = next(self._unlisted)
        self._num_listed += 1
        metadata = BlockMetadata(num_rows=1, size_bytes=block.nbytes, input_files=None, exec_stats=None)
        bundle = RefBundle((BlockEntry(ray.put(block), metadata),), owns_blocks=False, schema=SCHEMA)
        self._kept.append(bundle)
        self._metrics.on_input_received(bundle)
        return bundle
