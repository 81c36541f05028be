"""(manifest samples, seed, position) -> one Ray Data dataset over all epochs, in a fixed order.

The dataset starts as bare slot numbers; each task works out from the plan which photos its slots hold, reads and
augments them,
and yields one row a slot: a whole worker's batch. So nothing is re-sliced, re-shuffled or restarted between epochs,
the first batch does not wait for the manifest's length, and a task that Ray runs twice makes the same rows again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa

from pillsnap.data.batches import Batch, PhotoReader
from pillsnap.data.plan import Slot, StreamPlan

if TYPE_CHECKING:
    import ray


_PAUSE_S = 0.01


class Recipe(Protocol):
    """Makes one worker's batch of a task."""

    def make(self, samples: pa.Table, slot: Slot, seed: int, capacity: int, reader: PhotoReader) -> Batch: ...


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

    def dataset(self, first_slot: int = 0) -> ray.data.Dataset:
        """The rows from `first_slot` to the end, in order."""
        import ray

        with _batch_blocks():
            num_slots = self.plan.num_slots - first_slot
            slots = ray.data.range(num_slots, override_num_blocks=max(1, -(-num_slots // self.batches_per_read)))
            return slots.map_batches(
                _make_batches,
                fn_kwargs={"stream": self, "first_slot": first_slot},
                batch_size=None,
                zero_copy_batch=True,
                num_cpus=self.decoding_cpus,
            )


def execution_options() -> Any:
    """Ray Data options under which rows reach the workers in the plan's order."""
    from ray.data import ExecutionOptions

    return ExecutionOptions(preserve_order=True)


class _batch_blocks:
    """A Ray Data context in which every row, a whole batch, is a block of its own; the caller's context comes back
    after.
    """

    def __enter__(self) -> None:
        from ray.data import DataContext

        self.before = DataContext.get_current()
        context = self.before.copy()
        context.target_max_block_size = context.target_min_block_size = 1
        context.execution_options = execution_options()
        context.enable_progress_bars = False
        context.custom_execution_callback_classes = [_pausing_callback()]
        DataContext._set_current(context)

    def __exit__(self, *_: object) -> None:
        from ray.data import DataContext

        DataContext._set_current(self.before)


def _pausing_callback() -> type:
    from ray.data._internal.execution.execution_callback import ExecutionCallback

    class PauseUnderBackpressure(ExecutionCallback):
        """Rests while finished batches wait for a slow consumer.

        Ray Data's scheduling loop then finds work that it may not take yet, and asks again at once: measured on two
        cores, it spends 80 % of one of them on nothing.
        """

        def on_execution_step(self, executor: Any) -> None:
            if any(operator._in_task_output_backpressure for operator in executor._topology):
                time.sleep(_PAUSE_S)

    return PauseUnderBackpressure


def _make_batches(slots: Batch, *, stream: Stream, first_slot: int) -> Iterator[Batch]:
    import cv2

    cv2.setNumThreads(1)
    for number in slots["id"]:
        slot = stream.plan.slot(int(number) + first_slot)
        samples = _fetch(stream.train_samples if slot.training else stream.val_samples)
        batch = stream.recipe.make(samples, slot, stream.plan.seed, stream.plan.worker_batch_size, stream.reader)
        where = {"epoch": slot.epoch, "training": slot.training, "step": slot.step}
        yield {name: np.asarray(value)[None] for name, value in (batch | where).items()}


@lru_cache(maxsize=4)
def _fetch(samples: ray.ObjectRef) -> pa.Table:
    import ray

    return ray.get(samples)


def share_samples(samples: pa.Table) -> ray.ObjectRef:
    """Put samples where every task reads them without a copy."""
    import ray

    return ray.put(samples.combine_chunks())
