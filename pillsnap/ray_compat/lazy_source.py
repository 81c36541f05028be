"""What is to be read, as a source of Ray Data: ranges of slots, listed only a little ahead of their reading.

Ray Data's own sources list everything before the first batch (132 s for 140,000 reads), and listing in a task costs a
process. Like `scheduling`, it touches parts of Ray Data that are not its public interface.
"""

from __future__ import annotations

from collections import deque
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

_SCHEMA = pa.schema([("first", pa.int64()), ("end", pa.int64())])
_LISTED_AHEAD = 64
_KEPT = 1024


@dataclass(frozen=True, repr=False, eq=False)
class Reads(LogicalOperator, SourceOperator):
    """Blocks of one row (first, end): the slots from `first_slot` to `end_slot`, `slots_per_read` a block, but fewer in
    the first `num_short`.
    """

    first_slot: int
    end_slot: int
    slots_per_read: int
    num_short: int
    slots_per_short_read: int
    _input_dependencies: list[LogicalOperator] = field(init=False, repr=False, default_factory=list)

    def output_data(self) -> None:
        """Nothing is there before it runs."""

    @property
    def num_outputs(self) -> int:
        """Blocks."""
        num_slots, in_short = self.end_slot - self.first_slot, self.num_short * self.slots_per_short_read
        if num_slots <= in_short:
            return -(-num_slots // self.slots_per_short_read)
        return self.num_short + -(-(num_slots - in_short) // self.slots_per_read)

    def num_slots_of(self, read: int) -> int:
        """Slots of a read, by its number; the last may have fewer."""
        return self.slots_per_short_read if read < self.num_short else self.slots_per_read

    def infer_metadata(self) -> BlockMetadata:
        """Rows and bytes of all blocks."""
        return BlockMetadata(num_rows=self.num_outputs, size_bytes=None, input_files=None, exec_stats=None)

    def infer_schema(self) -> pa.Schema:
        """Two numbers."""
        return _SCHEMA


def reads_dataset(
    first_slot: int, end_slot: int, slots_per_read: int, *, num_short: int = 0, slots_per_short_read: int = 1
) -> Dataset:
    """A dataset of one row (first, end) a read, in order."""
    context = DataContext.get_current().copy()
    reads = Reads(first_slot, end_slot, slots_per_read, num_short, slots_per_short_read)
    plan = LogicalPlan(reads, context)
    return Dataset(plan, context, DatasetStats(metadata={}, parent=None))


def teach_planner() -> None:
    """Let Ray Data plan `Reads` in this process; whichever process executes a stream has to have called it."""
    Planner._DEFAULT_PLAN_FNS[Reads] = lambda reads, _, context: _ReadList(context, reads)


class _ReadList(InputDataBuffer):
    """Makes the blocks when the reading has come near them."""

    def __init__(self, context: DataContext, reads: Reads) -> None:
        self._reads, self._next_slot, self._num_listed = reads, reads.first_slot, 0
        # A block must be there for as long as Ray may have to make again what was made of it. What has been consumed
        # is not made again, and of the rest there is less than this.
        self._kept: deque[RefBundle] = deque(maxlen=_KEPT)
        super().__init__(context, input_data=[])
        self._estimated_num_output_bundles = self._estimated_num_output_rows = reads.num_outputs

    def start(self, options: ExecutionOptions, block_ref_counter: Any) -> None:
        (self._reader,) = self.output_dependencies
        super().start(options, block_ref_counter)

    def throttling_disabled(self) -> bool:
        # It takes neither cores nor memory; else Ray Data keeps a part of both for it, and they stand still.
        return True

    def has_execution_finished(self) -> bool:
        return self._next_slot >= self._reads.end_slot

    def has_next(self) -> bool:
        ahead = self._num_listed - self._reader.metrics.num_inputs_received
        return self._next_slot < self._reads.end_slot and ahead < _LISTED_AHEAD

    def _get_next_inner(self) -> RefBundle:
        first = self._next_slot
        self._next_slot = min(first + self._reads.num_slots_of(self._num_listed), self._reads.end_slot)
        self._num_listed += 1
        block = pa.table({"first": [first], "end": [self._next_slot]}, schema=_SCHEMA)
        facts = BlockMetadata(num_rows=1, size_bytes=block.nbytes, input_files=None, exec_stats=None)
        bundle = RefBundle((BlockEntry(ray.put(block), facts),), owns_blocks=False, schema=_SCHEMA)
        self._kept.append(bundle)
        self._metrics.on_input_received(bundle)
        return bundle
