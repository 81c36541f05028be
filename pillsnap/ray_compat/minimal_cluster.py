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
    more nodes, or bring to the console what `log_to_driver=False` keeps from it; its agent, without which Ray does not
    run, listens nowhere. This process leaves out actors, too.
    """
    from ray._private import utils
    from ray._private.node import Node

    os.environ[_MARK] = "1"  # the cluster's processes inherit all of it
    for name, value in _HEAD.items():
        os.environ.setdefault(name, value)
    replaced = [
        *((Node, name, lambda node, **_: None) for name in ("start_api_server", "start_monitor", "start_log_monitor")),
        (utils, "get_dashboard_dependency_error", lambda: ImportError("left out")),  # the agent then has no servers
    ]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    for owner, name, replacement in replaced:
        setattr(owner, name, replacement)
    try:
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)
    leave_out_actors()


def is_lean() -> bool:
    """Whether this process belongs to a cluster whose head is lean."""
    return _MARK in os.environ


def leave_out_actors() -> None:
    """Keep Ray Data, in this process, from starting the actor that holds statistics for the dashboard, the one that
    knows which node each process of a pool is on, and the one that shares a cluster's resources among datasets and
    trainings: there is one node, and one of each. Nothing changes unless the head is lean.
    """
    if not is_lean():
        return
    from ray.data._internal import stats
    from ray.data._internal.cluster_autoscaler import rate_based_cluster_autoscaler
    from ray.data._internal.execution.operators import actor_pool_map_operator

    stats.get_or_create_stats_actor = actor_pool_map_operator.get_or_create_actor_location_tracker = _Nobody
    actor_pool_map_operator.get_actor_locations = lambda actors: {}
    rate_based_cluster_autoscaler.DefaultAutoscalingCoordinator = _WholeCluster


def leave_out_train_actors() -> None:
    """Keep Ray Train from starting the actor that frees the workers' resources after a driver's death: with a lean head
    the whole cluster ends with its driver. It asks the dashboard's server every second whether it has to. A training
    with a fixed number of workers also does without the actor that shares resources.
    """
    if not is_lean():
        return
    from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy, factory
    from ray.train.v2.api import data_parallel_trainer
    from ray.train.v2.api.callback import RayTrainCallback

    class UnannouncedWorkers(FixedScalingPolicy):
        """A fixed number of workers that are not asked for beforehand."""

        def after_controller_start(self, *_: object) -> None:
            self._coordinator_client = _NoClient()

    data_parallel_trainer.PlacementGroupCleanerCallback = RayTrainCallback
    factory.FixedScalingPolicy = UnannouncedWorkers


class _Nobody:
    """In place of an actor's handle: whatever it is told, nothing happens."""

    def __getattr__(self, name: str) -> _Nobody:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def remote(self, *args: object, **options: object) -> None:
        """Tell nobody."""


class _NoClient:
    """In place of Ray Train's client of the actor that shares resources."""

    def maybe_send_resource_request(self, *_: object) -> None: ...

    def cancel_resource_request(self) -> None: ...


class _WholeCluster:
    """In place of Ray Data's client of that actor: a dataset may use what there is, and Ray starts no more than fits
    beside what a training has taken.
    """

    def __init__(self, *_: object, **__: object) -> None:
        import ray

        self._resources = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}

    def request_resources(self, *_: object, **__: object) -> None: ...

    def cancel_request(self) -> None: ...

    def get_reserved_resources(self) -> dict[str, dict[str, float]]:
        """Each node's resources, by its id."""
        return self._resources
