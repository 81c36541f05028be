"""What a Ray cluster of one's own does without: processes and figures that serve several nodes, or Ray's dashboard.

Each of Ray's processes imports for seconds and then wakes 100 times a second for as long as it lives. On two cores
that took a tenth of what decodes. Like `scheduling`, it touches parts of Ray that are not its public interface.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

_MARK = "PILLSNAP_LEAN_RAY"
_HEAD = {
    "RAY_enable_metrics_collection": "0",
    "RAY_event_stats": "0",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


@contextmanager
def lean_head() -> Iterator[None]:
    """Let a `ray.init` within start a head that counts nothing, without the processes that serve a dashboard, ask for
    more nodes, or bring to the console what `log_to_driver=False` keeps from it. This process leaves out actors, too.
    """
    from ray._private.node import Node

    os.environ[_MARK] = "1"  # the cluster's processes inherit all of it
    for name, value in _HEAD.items():
        os.environ.setdefault(name, value)
    unused = {name: getattr(Node, name) for name in ("start_api_server", "start_monitor", "start_log_monitor")}
    for name in unused:
        setattr(Node, name, lambda node, **options: None)
    try:
        yield
    finally:
        for name, start in unused.items():
            setattr(Node, name, start)
    leave_out_actors()


def is_lean() -> bool:
    """Whether this process belongs to a cluster whose head is lean."""
    return _MARK in os.environ


def leave_out_actors() -> None:
    """Keep Ray Data, in this process, from starting the actor that holds statistics for the dashboard, and the one that
    knows which node each process of a pool is on: there is one node. Nothing changes unless the head is lean.
    """
    if not is_lean():
        return
    from ray.data._internal import stats
    from ray.data._internal.execution.operators import actor_pool_map_operator

    stats.get_or_create_stats_actor = actor_pool_map_operator.get_or_create_actor_location_tracker = _Nobody
    actor_pool_map_operator.get_actor_locations = lambda actors: {}


def leave_out_cleaner() -> None:
    """Keep Ray Train from starting the actor that frees the workers' resources after a driver's death: with a lean head
    the whole cluster ends with its driver. It asks the dashboard's server every second whether it has to.
    """
    if not is_lean():
        return
    from ray.train.v2.api import data_parallel_trainer
    from ray.train.v2.api.callback import RayTrainCallback

    data_parallel_trainer.PlacementGroupCleanerCallback = RayTrainCallback


class _Nobody:
    """In place of an actor's handle: whatever it is told, nothing happens."""

    def __getattr__(self, name: str) -> _Nobody:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def remote(self, *args: object, **options: object) -> None:
        """Tell nobody."""
