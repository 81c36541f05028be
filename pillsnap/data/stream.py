"""(manifest samples, seed, position) -> one Ray Data dataset over all epochs, in a fixed order.

The dataset starts as slot numbers. Each task derives from the plan which photos its slots hold, reads and augments
them, and yields one row per worker: that worker's batches of these slots. Nothing is sliced, shuffled or restarted
between epochs, the first batch does not wait for the whole manifest, and a task that Ray runs twice makes the same rows
again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import lru_cache
from threading import Thread
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from pillsnap.data.batch_maker import BatchMaker
from pillsnap.data.decode_workers import decode_ahead
from pillsnap.data.malloc import keep_freed_memory
from pillsnap.data.packing import as_row, pack, stack, unstack
from pillsnap.data.plan import Slot, StreamPlan
from pillsnap.data.recipes import Batch, Recipe, Row
from pillsnap.data.sources import Cutter, KeyMemo, Source, SplitStore, StoreSource
from pillsnap.data.windows import EncodedWindow
from pillsnap.photos.decode import BadImage
from pillsnap.photos.reader import PhotoReader
from pillsnap.ray_compat.actor_pool import map_in_actors
from pillsnap.ray_compat.locality import NearWorkers, slots_near
from pillsnap.ray_compat.minimal_cluster import is_minimal, without_helper_actors
from pillsnap.ray_compat.reads import Reads
from pillsnap.ray_compat.row_blocks import row_blocks
from pillsnap.ray_compat.source import reads_dataset

if TYPE_CHECKING:
    import ray


_STEPS_PER_READ_OF_STORE = 32
_ROWS_AHEAD = 4
_READS_PER_DECODER = 2
"""One is made while the next waits, so that no core is idle until Ray Data's next poll."""
_ROW_BYTES = 2**26
"""Maximum bytes of images in a row of several batches; larger rows would not lower the cost of a hand-over further."""


@dataclass(frozen=True)
class Stream:
    """Everything that determines the samples of a training; small enough to be sent with every Ray Data task."""

    plan: StreamPlan
    recipe: Recipe
    reader: PhotoReader
    train_samples: ray.ObjectRef
    val_samples: ray.ObjectRef
    batches_per_read: int
    decoding_cpus: float
    """CPUs that a task reserves. With 0, as many tasks run as there are workers."""
    train_store: SplitStore | None = None
    val_store: SplitStore | None = None
    ship_bytes: bool = False
    """Whether tasks send encoded windows, which `decode_ahead` decodes in the worker, instead of pixels."""
    ship_stored: bool = True
    """Whether they also send windows that are in the store: a worker on another node cannot read it."""
    decoders: int = 0
    """Number of actors that take one read after the other. With 0, each read is a task, on any node."""

    def dataset(self, first_slot: int = 0, nodes: Sequence[str] = ()) -> ray.data.Dataset:
        """The rows from `first_slot` to the end, in order.

        `nodes` are Ray's node ids of the workers, by rank: with several, tasks run near the worker they serve.
        """
        from ray.data import TaskPoolStrategy

        slots_per_read, near = self._slots_per_read, None
        if len(set(nodes)) > 1 and not self.ship_bytes:
            slots_per_read = slots_near(nodes, slots_per_read)
            near = NearWorkers(nodes, first_slot, slots_per_read)
        num_workers = self.plan.num_workers
        rows_per_read = min(slots_per_read, num_workers)
        # The first reads hold one batch per worker, so that no worker waits for several.
        num_short = 0 if self.ship_bytes else _READS_PER_DECODER * self.decoders
        reads = Reads(first_slot, self.plan.num_slots, slots_per_read, num_short, rows_per_read)
        options = {"batch_size": None, "zero_copy_batch": True, "num_cpus": self.decoding_cpus}
        if self.ship_bytes:
            blocks = row_blocks(rows_ahead=_ROWS_AHEAD * num_workers)
        else:
            blocks = row_blocks(rows_per_task=rows_per_read)
        with blocks:
            slots = reads_dataset(reads, near)
            if self.decoders and near is None:
                return map_in_actors(slots, _Decoder, self, size=self.decoders, in_flight=_READS_PER_DECODER, **options)
            tasks = None if self.decoding_cpus else TaskPoolStrategy(size=num_workers)
            return slots.map_batches(_make_batches, fn_kwargs={"stream": self}, compute=tasks, **options)

    @property
    def _slots_per_read(self) -> int:
        """Whole steps of all workers if it is more than one step: a worker's batches of a read become one row."""
        num_workers = self.plan.num_workers
        if self.ship_bytes:
            return num_workers * (_STEPS_PER_READ_OF_STORE if self.train_store else 1)
        steps = self.batches_per_read // num_workers
        image_bytes = self.recipe.size_px**2 * 3
        fitting = max(1, _ROW_BYTES // (self.plan.worker_batch_size * image_bytes))
        return min(steps, fitting) * num_workers or self.batches_per_read

    def batches(self, share: ray.data.DataIterator | ray.data.Dataset, num_processes: int) -> Iterator[Batch]:
        """The batches of a worker's share of this stream, or of the whole stream. If it ships bytes, `num_processes`
        processes decode them.
        """
        if self.ship_bytes:
            return decode_ahead(rows_of(share), self.batch_maker(), num_processes)
        return batches_of(share)

    def batch_maker(self) -> BatchMaker:
        """Makes this stream's batches; a process fetches the samples and computes their keys once."""
        refs = {True: self.train_samples, False: self.val_samples}
        return BatchMaker(
            self.plan,
            self.recipe,
            self.reader,
            samples={training: _fetch(ref) for training, ref in refs.items()},
            stores={True: self.train_store, False: self.val_store},
            keys={training: _keys(ref, self.recipe) for training, ref in refs.items()},
        )


class _Decoder:
    """`_make_batches` as an actor."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def __call__(self, slots: Row) -> Iterator[Row]:
        return _make_batches(slots, stream=self._stream)


def _make_batches(slots: Row, *, stream: Stream) -> Iterator[Row]:
    import cv2

    cv2.setNumThreads(1)
    keep_freed_memory()
    numbers = range(int(slots["first"][0]), int(slots["end"][0]))
    maker = stream.batch_maker()
    sources = {training: maker.source(training) for training in (True, False)}
    if stream.ship_bytes:
        yield from _shipped(numbers, maker, sources, stream.ship_stored)
    else:
        for share in _shares(numbers, stream.plan.num_workers):
            yield _make_row(share, maker, sources)
    for source in sources.values():
        if isinstance(source, StoreSource):
            source.flush()


def _shares(numbers: range, num_workers: int) -> list[range]:
    """The slots of each worker, in order; `numbers` are whole steps or a part of one."""
    return [numbers[first::num_workers] for first in range(min(num_workers, len(numbers)))]


def _make_row(numbers: range, maker: BatchMaker, sources: Mapping[bool, Source]) -> Row:
    """One row: one worker's batches."""
    plan, size_px = maker.plan, maker.recipe.size_px
    images = np.empty((len(numbers), plan.worker_batch_size, size_px, size_px, 3), np.uint8)
    batches: list[Batch] = []
    for number, target in zip(numbers, images, strict=True):
        slot = plan.slot(number)
        batches.append(maker.make(slot, sources[slot.training], target))
    return stack(batches, images)


def _shipped(numbers: range, maker: BatchMaker, sources: Mapping[bool, Source], ship_stored: bool) -> Iterator[Row]:
    """Rows for the workers in turn. A hand-over costs the same for any row: stored steps of a worker share one."""
    slots = {number: maker.plan.slot(number) for number in numbers}
    stored = all(sources[slot.training].has_all(maker.samples[slot.training], slot.members) for slot in slots.values())

    def fetch(slot: Slot, member: int) -> EncodedWindow | BadImage | None:
        if stored and not ship_stored:
            return None
        return sources[slot.training].fetch(maker.samples[slot.training], member)

    num_workers = maker.plan.num_workers
    num_together = len(numbers) if stored else num_workers
    for first in range(0, len(numbers), num_together):
        for share in _shares(numbers[first : first + num_together], num_workers):
            yield as_row(pack({number: slots[number] for number in share}, fetch))


@lru_cache(maxsize=4)
def _fetch(samples: ray.ObjectRef) -> pa.Table:
    import ray

    return ray.get(samples)


@lru_cache(maxsize=4)
def _keys(samples: ray.ObjectRef, cutter: Cutter) -> KeyMemo:
    return KeyMemo(cutter)


def warm_up_reading() -> None:
    """Start a process that imports, for seconds, what the first reading task needs. Actors do not use it."""
    import ray

    ray.remote(num_cpus=1)(_import_reading).remote()


def _import_reading() -> None:
    import ray.data  # noqa: F401


def batches_of(share: ray.data.DataIterator | ray.data.Dataset) -> Iterator[Batch]:
    """The batches of a worker's share of a stream, or of a whole stream, unless it ships bytes; see `rows_of`."""
    return (batch for row in rows_of(share) for batch in unstack(row))


def rows_of(share: ray.data.DataIterator | ray.data.Dataset) -> Iterator[Row]:
    """The rows of a worker's share of a stream, or of a whole stream; two are fetched ahead from other nodes.

    The first is requested at once, in a thread: the stream's processes start while the caller prepares its model.
    """
    rows, first = _rows(share), Future[Row | None]()

    def request() -> None:
        try:
            first.set_result(next(rows, None))
        except BaseException as error:
            first.set_exception(error)

    Thread(target=request, name="first row", daemon=True).start()
    return _from_first(first, rows)


def _from_first(first: Future[Row | None], rows: Iterator[Row]) -> Iterator[Row]:
    row = first.result()
    if row is not None:
        yield row
        yield from rows


def _rows(share: ray.data.DataIterator | ray.data.Dataset) -> Iterator[Row]:
    # Without other nodes there is nothing to fetch, and the first row would wait for two more.
    num_ahead = 0 if is_minimal() else 2
    with without_helper_actors():
        yield from share.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=num_ahead)


def share_samples(samples: pa.Table) -> ray.ObjectRef:
    """Put samples into the object store, from which every task reads them without a copy."""
    import ray

    return ray.put(samples.combine_chunks())
