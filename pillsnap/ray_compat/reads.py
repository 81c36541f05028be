"""The reads of a stream: ranges of slots, in order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

SCHEMA = pa.schema([("first", pa.int64()), ("end", pa.int64())])


@dataclass(frozen=True)
class Reads:
    """The slots from `first_slot` to `end_slot` in ranges of `slots_per_read`; shorter in the first `num_short`."""

    first_slot: int
    end_slot: int
    slots_per_read: int
    num_short: int = 0
    slots_per_short_read: int = 1

    @property
    def num_reads(self) -> int:
        """Number of ranges."""
        num_slots, in_short = self.end_slot - self.first_slot, self.num_short * self.slots_per_short_read
        if num_slots <= in_short:
            return -(-num_slots // self.slots_per_short_read)
        return self.num_short + -(-(num_slots - in_short) // self.slots_per_read)

    def __iter__(self) -> Iterator[pa.Table]:
        """A block of one row (first, end) per read."""
        first = self.first_slot
        for read in range(self.num_reads):
            num_slots = self.slots_per_short_read if read < self.num_short else self.slots_per_read
            end = min(first + num_slots, self.end_slot)
            yield pa.table({"first": [first], "end": [end]}, schema=SCHEMA)
            first = end
