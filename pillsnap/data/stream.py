"""(manifest samples, seed, position) -> one Ray Data dataset over all epochs, in a fixed order.

The dataset starts as bare slot numbers; each task works out from the plan which photos its slots hold, reads and
augments them, and yields one row a slot: a whole worker's batch. So nothing is re-sliced, re-shuffled or restarted
between epochs, the first batch does not wait for the manifest's length, and a task that Ray runs twice makes the same
rows again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa

from pillsnap.data import shipping
from pillsnap.data.allocation import keep_freed_memory
from pillsnap.data.batches import Batch
from pillsnap.data.plan import Slot, StreamPlan
from pillsnap.data.scheduling import BatchBlocks
from pillsnap.data.sources import Cutter, PhotoReader, Source, SplitStore, StoreSource

if TYPE_CHECKING:
    import ray


_STEPS_PER_SHIPPED_ROW = 8


class Recipe(Cutter, Protocol):
    """Makes one worker's batch of a task."""

    def make(self, samples: pa.Table, slot: Slot, seed: int, capacity: int, source: Source) -> Batch: ...


@dataclass(frozen=True)
class Stream:
    """Everything that decides what a training sees; small enough to travel with every Ray Data task."""

    plan: StreamPlan
    recipe: Recipe
    reader: PhotoReader
    train_samples: ray.ObjectRef
    val_samples: ray.ObjectRef
    batches_per_read: int
    decoding_cpus: float
    train_store: SplitStore | None = None
    val_store: SplitStore | None = None
    ship_bytes: bool = False
    """Whether tasks hand over encoded windows, for `decode_ahead` in the worker, instead of pixels."""

    def dataset(self, first_slot: int = 0) -> ray.data.Dataset:
        """The rows from `first_slot` to the end, in order."""
        import ray

        with BatchBlocks():
            # One block a read would be planned, and stored, before the first batch: with 140,000 reads that took
            # 132 s. A task that lists them as they are needed takes none.
            reads = ray.data.from_arrow(pa.table({"first": [first_slot], "end": [self.plan.num_slots]})).map_batches(
                _list_reads, fn_kwargs={"slots_per_read": self._slots_per_read}, batch_size=None, num_cpus=0
            )
            return reads.map_batches(
                _make_batches,
                fn_kwargs={"stream": self},
                batch_size=None,
                zero_copy_batch=True,
                num_cpus=self.decoding_cpus,
            )

    @property
    def _slots_per_read(self) -> int:
        if not self.ship_bytes:
            return self.batches_per_read
        # Every row costs the same to hand over, and stored windows are small: several steps of a worker are one row.
        return self.plan.num_workers * (_STEPS_PER_SHIPPED_ROW if self.train_store else 1)

    def samples(self, training: bool) -> pa.Table:
        """The samples of one split, fetched once a process."""
        return _fetch(self.train_samples if training else self.val_samples)

    def source(self, training: bool) -> Source:
        """Where the windows of one split come from."""
        store = self.train_store if training else self.val_store
        return Source(self.reader) if store is None else store.source(self.reader)

    def make(self, slot: Slot, source: Source) -> Batch:
        """One worker's batch."""
        samples = self.samples(slot.training)
        return self.recipe.make(samples, slot, self.plan.seed, self.plan.worker_batch_size, source)


def _list_reads(slots: Batch, *, slots_per_read: int) -> Iterator[Batch]:
    end = int(slots["end"][0])
    for first in range(int(slots["first"][0]), end, slots_per_read):
        yield {"first": np.array([first]), "end": np.array([min(first + slots_per_read, end)])}


def _make_batches(slots: Batch, *, stream: Stream) -> Iterator[Batch]:
    import cv2

    cv2.setNumThreads(1)
    keep_freed_memory()
    numbers = range(int(slots["first"][0]), int(slots["end"][0]))
    if stream.ship_bytes:
        sources = {training: stream.source(training) for training in (True, False)}
        for worker in range(stream.plan.num_workers):
            share = {number: stream.plan.slot(number) for number in numbers[worker :: stream.plan.num_workers]}
            yield _as_row(
                shipping.pack(
                    share, lambda slot, member: sources[slot.training].fetch(stream.samples(slot.training), member)
                )
            )
        made = list(sources.values())
    else:
        made = []
        for number in numbers:
            slot = stream.plan.slot(number)
            made.append(stream.source(slot.training))  # one a batch: it also counts the batch's time
            where = {"epoch": slot.epoch, "training": slot.training, "step": slot.step}
            yield _as_row(stream.make(slot, made[-1]) | where)
    for source in made:
        if isinstance(source, StoreSource):
            source.flush()


def _as_row(batch: dict[str, Any]) -> Batch:
    return {name: np.asarray(value)[None] for name, value in batch.items()}


@lru_cache(maxsize=4)
def _fetch(samples: ray.ObjectRef) -> pa.Table:
    import ray

    return ray.get(samples)


def share_samples(samples: pa.Table) -> ray.ObjectRef:
    """Put samples where every task reads them without a copy."""
    import ray

    return ray.put(samples.combine_chunks())
