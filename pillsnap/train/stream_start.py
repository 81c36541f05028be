"""Where the stream begins: at the last checkpoint, for as many workers as there are at this start."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray.data
import ray.train

from pillsnap.data.scheduling import execution_options
from pillsnap.data.stream import Stream
from pillsnap.train.published import find_run_checkpoint

if TYPE_CHECKING:
    from ray.data import DataIterator, Dataset


class StreamFromCheckpoint(ray.train.DataConfig):
    """Ray Train asks it for the workers' shares at every start of the workers, when their number is known.

    The dataset that Ray Train was given is a placeholder: which slots there are depends on that number.
    """

    def __init__(self, stream: Stream, run: str, task: str) -> None:
        """`run` is the folder or URI of the run whose `task` is trained."""
        super().__init__(execution_options=execution_options())
        self._stream, self._run, self._task = stream, run, task

    def configure(
        self, datasets: dict[str, Dataset], world_size: int, *args: Any, **kwargs: Any
    ) -> list[dict[str, DataIterator]]:
        """Each worker's share of the stream from the last checkpoint on, by the dataset's name."""
        (name,) = datasets
        stream = replace(self._stream, plan=replace(self._stream.plan, num_workers=world_size))
        last, _ = find_run_checkpoint(self._run, self._task, role="worker")
        first = stream.plan.first_slot(last.position.epoch, last.position.epoch_step) if last else 0
        return super().configure({name: stream.dataset(first)}, world_size, *args, **kwargs)


def placeholder() -> Dataset:
    """Stands for the stream until the workers are there."""
    return ray.data.range(1)
