"""(manifest samples, seed, position) -> one Ray Data dataset over all epochs, in a fixed order.

The dataset starts as bare slot numbers; each task works out from the plan which photos its slots hold, reads and
augments them, and yields one row for each worker: its batches of these slots. So nothing is re-sliced, re-shuffled or
restarted between epochs, the first batch does not wait for the manifest's length, and a task that Ray runs twice makes
the same rows again.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from pillsnap.data.batch_maker import BatchMaker
from pillsnap.data.malloc import keep_freed_memory
from pillsnap.data.packing import as_row, pack, stack, unstack
from pillsnap.data.plan import Slot, StreamPlan
from pillsnap.data.recipes import Batch, Recipe, Row
from pillsnap.data.sources import Cutter, KeyMemo, Source, SplitStore, StoreSource
from pillsnap.data.windows import EncodedWindow
from pillsnap.photos.decode import BadImage
from pillsnap.photos.reader import PhotoReader
from pillsnap.ray_compat.executor_pacing import RowBlocks
from pillsnap.ray_compat.locality import NearWorkers, slots_near
from pillsnap.ray_compat.minimal_cluster import is_lean, leave_out_actors

if TYPE_CHECKING:
    import ray


_STEPS_PER_READ_OF_STORE = 32
_ROWS_AHEAD = 4
_READS_PER_DECODER = 2
"""One is made while the next waits: no core stands still until Ray Data looks again."""
_ROW_BYTES = 2**26
"""Most bytes of images in a row of several batches: handing over costs little beside making so many."""


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
    """CPUs that a task reserves. With none, as many tasks run as there are workers."""
    train_store: SplitStore | None = None
    val_store: SplitStore | None = None
    ship_bytes: bool = False
    """Whether tasks hand over encoded windows, for `decode_ahead` in the worker, instead of pixels."""
    ship_stored: bool = True
    """Whether that holds for windows of the store too, which a worker cannot read when it lies on another node."""
    decoders: int = 0
    """Processes that stay and are given one read after the other. With none, tasks come and go, on any node."""

    def dataset(self, first_slot: int = 0, nodes: Sequence[str] = ()) -> ray.data.Dataset:
        """The rows from `first_slot` to the end, in order.

        `nodes` are Ray's ids of the workers' nodes, by rank: with several, tasks run near the worker they work for.
        """
        from ray.data import ActorPoolStrategy
        from ray.util.annotations import RayDeprecationWarning

        from pillsnap.ray_compat.lazy_source import reads_dataset

        slots_per_read, near = self._slots_per_read, None
        if len(set(nodes)) > 1 and not self.ship_bytes:
            slots_per_read = slots_near(nodes, slots_per_read)
            near = NearWorkers(nodes, first_slot, slots_per_read)
        num_workers, num_short = self.plan.num_workers, 0
        rows_per_read = min(slots_per_read, num_workers)
        if self.ship_bytes:
            blocks = RowBlocks(rows_ahead=_ROWS_AHEAD * num_workers)
        else:
            blocks = RowBlocks(near=near, rows_per_task=rows_per_read)
            num_short = _READS_PER_DECODER * self.decoders  # whose rows are one batch: nobody waits for several
        with blocks:
            reads = reads_dataset(
                first_slot, self.plan.num_slots, slots_per_read, num_short=num_short, slots_per_short_read=rows_per_read
            )
            options = {"batch_size": None, "zero_copy_batch": True, "num_cpus": self.decoding_cpus}
            if self.decoders and near is None:
                pool = ActorPoolStrategy(size=self.decoders, max_tasks_in_flight_per_actor=_READS_PER_DECODER)
                options["allow_out_of_order_execution"] = False  # else the first read may be made after the second
                with warnings.catch_warnings():
                    # Ray has no other name for this option yet.
                    warnings.simplefilter("ignore", RayDeprecationWarning)
                    return reads.map_batches(_Decoder, fn_constructor_args=(self,), compute=pool, **options)
            concurrency = None if self.decoding_cpus else self.plan.num_workers
            return reads.map_batches(_make_batches, fn_kwargs={"stream": self}, concurrency=concurrency, **options)

    @property
    def _slots_per_read(self) -> int:
        """Whole steps of all workers where it is more than one of each, since a worker's batches become one row."""
        num_workers = self.plan.num_workers
        if self.ship_bytes:
            return num_workers * (_STEPS_PER_READ_OF_STORE if self.train_store else 1)
        steps = self.batches_per_read // num_workers
        image_bytes = self.recipe.size_px**2 * 3
        fitting = max(1, _ROW_BYTES // (self.plan.worker_batch_size * image_bytes))
        return min(steps, fitting) * num_workers or self.batches_per_read

    def batch_maker(self) -> BatchMaker:
        """Makes this stream's batches in this process, which fetches the samples and computes their keys once."""
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
    """`_make_batches` for a process that stays."""

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
    """The slots of each worker, in their order, where `numbers` are whole steps or a part of one."""
    return [numbers[first::num_workers] for first in range(min(num_workers, len(numbers)))]


def _make_row(numbers: range, maker: BatchMaker, sources: Mapping[bool, Source]) -> Row:
    """A row of batches of one worker."""
    plan, size_px = maker.plan, maker.recipe.size_px
    images = np.empty((len(numbers), plan.worker_batch_size, size_px, size_px, 3), np.uint8)
    batches: list[Batch] = []
    for number, target in zip(numbers, images, strict=True):
        slot = plan.slot(number)
        batches.append(maker.make(slot, sources[slot.training], target))
    return stack(batches, images)


def _shipped(numbers: range, maker: BatchMaker, sources: Mapping[bool, Source], ship_stored: bool) -> Iterator[Row]:
    """Rows for the workers in turn.

    Every row costs the same to hand over: where nothing has to be cut first, all steps of a worker are one.
    """
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
    """Start a process for tasks that read, and let it import for seconds, before the first of them is there. Ray gives
    it to no decoder that stays.
    """
    import ray

    ray.remote(num_cpus=1)(_import_reading).remote()


def _import_reading() -> None:
    import pillsnap.ray_compat.lazy_source  # noqa: F401


def batches_of(share: ray.data.DataIterator | ray.data.Dataset) -> Iterator[Batch]:
    """The batches of a worker's share of a stream, or of all of it, unless it ships bytes."""
    for row in rows_of(share):
        yield from unstack(row)


def rows_of(share: ray.data.DataIterator | ray.data.Dataset) -> Iterable[Row]:
    """The rows of a worker's share of a stream, or of all of it, two fetched ahead where they may be on other nodes."""
    leave_out_actors()
    # Where nothing has to be fetched, that would keep the first row until two more are made.
    num_ahead = 0 if is_lean() else 2
    return share.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=num_ahead)


def share_samples(samples: pa.Table) -> ray.ObjectRef:
    """Put samples where every task reads them without a copy."""
    import ray

    return ray.put(samples.combine_chunks())
