"""Starts the stream at the last checkpoint, planned for the current number of workers."""

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
    """Builds the workers' shares whenever Ray Train starts workers, once their number is known.

    The dataset passed to Ray Train is a placeholder: the slots depend on that number.
    """

    def __init__(self, stream: Stream, run: str, task: str, cpus_per_worker: float) -> None:
        """`run` is the folder or URI of the run, in which `task` is trained."""
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
        stream = with_decoders(stream, nodes, self._cpus_per_worker)
        return super().configure(
            {name: stream.dataset(first, nodes)}, world_size, worker_handles, worker_node_ids, **kwargs
        )


def with_decoders(stream: Stream, workers: Sequence[str], cpus_per_worker: float) -> Stream:
    """The stream with the CPUs per task and the number of actors that the cluster has room for beside the `workers`,
    given by their nodes.
    """
    cpus = {node["NodeID"]: node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]}
    share = decoding_share(cpus, workers, cpus_per_worker, stream.decoding_cpus)
    num_decoders = decoders(cpus, workers, cpus_per_worker, share) if not stream.ship_bytes else 0
    return replace(stream, decoding_cpus=share, decoders=num_decoders)


def decoding_share(
    cpus: Mapping[str, float], workers: Sequence[str], cpus_per_worker: float, wanted: float
) -> float:  # fmt: skip
    """CPUs per decoding task: `wanted`, or what the workers leave free on the node with most free CPUs.

    `cpus` are CPUs by node, `workers` the nodes of the workers. Elastic training may take every CPU: a task that
    reserves more than any node has free would wait forever, and one that reserves none runs beside the workers.
    """
    most = max(_free_cpus(cpus, workers, cpus_per_worker), default=0.0)
    return min(wanted, max(0.0, math.floor(most * 1e4) / 1e4))  # Ray's resolution


def decoders(cpus: Mapping[str, float], workers: Sequence[str], cpus_per_worker: float, share: float) -> int:
    """Number of decoding actors with `share` CPUs each, at most one per core, on a single node.

    0 with several nodes: nodes may join and leave, so reads are tasks that run on any of them.
    """
    if len(cpus) != 1:
        return 0
    (cores,), (free,) = cpus.values(), _free_cpus(cpus, workers, cpus_per_worker)
    return max(1, min(math.floor(cores), math.floor(free / share + 1e-6))) if share else len(workers)


def _free_cpus(cpus: Mapping[str, float], workers: Sequence[str], cpus_per_worker: float) -> list[float]:
    return [there - cpus_per_worker * sum(node == taken for taken in workers) for node, there in cpus.items()]


def placeholder() -> Dataset:
    """Stands for the stream until the number of workers is known."""
    return ray.data.range(1)
