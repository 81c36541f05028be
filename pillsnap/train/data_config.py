"""Where the stream begins: at the last checkpoint, for as many workers as there are at this start."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray
import ray.data
import ray.train

from pillsnap.data.stream import Stream
from pillsnap.ray_compat.row_blocks import execution_options
from pillsnap.runs.remote_checkpoints import find_run_checkpoint

if TYPE_CHECKING:
    from ray.data import DataIterator, Dataset


class StreamFromCheckpoint(ray.train.DataConfig):
    """Ray Train asks it for the workers' shares at every start of the workers, when their number is known.

    The dataset that Ray Train was given is a placeholder: which slots there are depends on that number.
    """

    def __init__(self, stream: Stream, run: str, task: str, cpus_per_worker: float) -> None:
        """`run` is the folder or URI of the run whose `task` is trained."""
        super().__init__(execution_options=execution_options())
        self._stream, self._run, self._task, self._cpus_per_worker = stream, run, task, cpus_per_worker

    def configure(
        self,
        datasets: dict[str, Dataset],
        world_size: int,
        worker_handles: list[Any] | None,
        worker_node_ids: list[str] | None,
        **kwargs: Any,
    ) -> list[dict[str, DataIterator]]:
        """Each worker's share of the stream from the last checkpoint on, by the dataset's name."""
        (name,) = datasets
        stream = replace(self._stream, plan=replace(self._stream.plan, num_workers=world_size))
        last, _ = find_run_checkpoint(self._run, self._task, role="worker")
        first = stream.plan.first_slot(last.position.epoch, last.position.epoch_step) if last else 0
        nodes = worker_node_ids or ()
        cpus = {node["NodeID"]: node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]}
        share = decoding_share(cpus, nodes, self._cpus_per_worker, stream.decoding_cpus)
        num_decoders = decoders(cpus, nodes, self._cpus_per_worker, share) if not stream.ship_bytes else 0
        stream = replace(stream, decoding_cpus=share, decoders=num_decoders)
        return super().configure(
            {name: stream.dataset(first, nodes)}, world_size, worker_handles, worker_node_ids, **kwargs
        )


def decoding_share(
    cpus: Mapping[str, float], workers: Sequence[str], cpus_per_worker: float, wanted: float
) -> float:  # fmt: skip
    """CPUs that a decoding task may ask for: what was `wanted`, or less where workers have left no node so many.

    `cpus` are each node's, `workers` the nodes of the workers. Elastic training can take every CPU that there is, and a
    task that asks for more than is free anywhere would wait for ever; one that asks for nothing runs beside them.
    """
    most = max(_free_cpus(cpus, workers, cpus_per_worker), default=0.0)
    return min(wanted, max(0.0, math.floor(most * 1e4) / 1e4))  # the steps in which Ray counts


def decoders(cpus: Mapping[str, float], workers: Sequence[str], cpus_per_worker: float, share: float) -> int:
    """How many processes with `share` CPUs each decode for as long as the stream runs, beside the workers of the only
    node: no more than it has cores, since none of them ever waits for a read. None where there are several nodes, which
    come and go: tasks run on any.
    """
    if len(cpus) != 1:
        return 0
    (cores,), (free,) = cpus.values(), _free_cpus(cpus, workers, cpus_per_worker)
    return max(1, min(math.floor(cores), math.floor(free / share + 1e-6))) if share else len(workers)


def _free_cpus(cpus: Mapping[str, float], workers: Sequence[str], cpus_per_worker: float) -> list[float]:
    return [there - cpus_per_worker * sum(node == taken for taken in workers) for node, there in cpus.items()]


def placeholder() -> Dataset:
    """Stands for the stream until the workers are there."""
    return ray.data.range(1)
