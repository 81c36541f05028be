"""Starts a local Ray cluster without the processes that only dashboards and further nodes need.

Each of Ray's processes imports for seconds and then wakes 100 times per second: on two cores that is a tenth of the
time that could decode.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from pillsnap.processes import added_variables
from pillsnap.ray_compat import capabilities
from pillsnap.ray_compat.isolation import on_loopback, own_import_path
from pillsnap.ray_compat.lifetime import CHILD_OF_RAYLET, session_of_this_driver, workers_end_with_raylet
from pillsnap.ray_compat.patches import original, replaced
from pillsnap.ray_compat.token import token_variables

_MARK = "PILLSNAP_MINIMAL_RAY"
"""Set in every process of a minimal cluster."""
_HEAD = {
    "RAY_enable_metrics_collection": "0",
    "RAY_event_stats": "0",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # the only node cannot be drained
    # How long a process outlives a killed GCS (60 s by default) where no thread of Python can notice it: ray.init
    # connects in native code with the interpreter's lock.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
}


@contextmanager
def local_cluster(**options: Any) -> Iterator[Path]:
    """Run `ray.init(**options)` on this machine and yield the folder of its logs; the caller shuts Ray down.

    Where the probe allows it, the head is minimal: no dashboard server, autoscaler or log monitor; and its agent, which
    Ray cannot run without, serves nothing. Ports are bound to loopback, and the token file is private. Usage statistics
    are never sent, unless the user's environment asks for it.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options = {"address": "local", "include_dashboard": False, "log_to_driver": False, **options}
    with ExitStack() as stack:
        stack.enter_context(added_variables(token_variables()))
        stack.enter_context(on_loopback())
        import ray  # within: it reads the environment

        with ExitStack() as start:
            options |= start.enter_context(own_import_path())
            start.enter_context(workers_end_with_raylet())
            if capabilities.minimal_head():
                stack.enter_context(added_variables({_MARK: "1", **_HEAD}))
                start.enter_context(_minimal_head())
            context = ray.init(**options)
        folder = Path(context.address_info["session_dir"])
        stack.enter_context(session_of_this_driver(folder))
        stack.enter_context(without_helper_actors())
        yield folder


@contextmanager
def _minimal_head() -> Iterator[None]:
    from ray._private import node as nodes
    from ray._private import ray_constants, services, utils
    from ray._private.node import Node

    python = services._build_python_executable_command_memory_profileable
    agents = (ray_constants.PROCESS_TYPE_DASHBOARD_AGENT, ray_constants.PROCESS_TYPE_RUNTIME_ENV_AGENT)

    def start_nothing(node: Any, **_: Any) -> None: ...

    def with_raylet(component: str, *others: Any, **named: Any) -> list[str]:
        command = python(component, *others, **named)
        return [*command, str(CHILD_OF_RAYLET)] if component in agents else command

    wait = original(nodes, "wait_for_persisted_port")

    def wait_interruptibly(folder: str, node_id: str, name: str, timeout_ms: int) -> int:
        """Ray waits in native code and keeps the interpreter's lock: no signal or thread would notice that the GCS has
        ended.
        """
        path, end_s = Path(folder, nodes.get_port_filename(node_id, name)), time.monotonic() + timeout_ms / 1000
        while not path.exists() and time.monotonic() < end_s:
            time.sleep(0.01)
        return wait(folder, node_id, name, timeout_ms=0)

    with replaced(
        (nodes, "wait_for_persisted_port", wait_interruptibly),
        *((Node, name, start_nothing) for name in ("start_api_server", "start_monitor", "start_log_monitor")),
        (services, python.__name__, with_raylet),
        (utils, "get_dashboard_dependency_error", lambda: ImportError("left out")),  # the agent then has no servers
    ):
        yield


def is_minimal() -> bool:
    """Whether this process belongs to a minimal cluster, which has one node."""
    return _MARK in os.environ


@contextmanager
def without_helper_actors() -> Iterator[None]:
    """Keep Ray, in this process, from starting actors that one node with one training does not need.

    They collect statistics for the dashboard, store the node of each process of a pool, divide the cluster among
    datasets and trainings, and free what a training holds after the death of its controller, with which this cluster
    ends. Changes nothing outside a minimal cluster.
    """
    with ExitStack() as stack:
        if is_minimal():
            stack.enter_context(replaced(*_stand_ins()))
        yield


def _stand_ins() -> Iterator[tuple[Any, str, Any]]:
    if capabilities.no_stats_actor():
        from ray.data._internal import stats

        yield stats, "get_or_create_stats_actor", _NullActorHandle
    if capabilities.no_location_actor():
        from ray.data._internal.execution.operators import actor_pool_map_operator as pool

        yield pool, "get_or_create_actor_location_tracker", _NullActorHandle
        yield pool, "get_actor_locations", _no_locations
    if capabilities.no_autoscaling_actor():
        from ray.data._internal.cluster_autoscaler import rate_based_cluster_autoscaler as autoscaler

        yield autoscaler, "DefaultAutoscalingCoordinator", _WholeCluster
    if capabilities.no_cleaner_actor():
        from ray.train.v2._internal.execution.callback import RayTrainCallback
        from ray.train.v2.api import data_parallel_trainer as trainer

        # The actor asks the dashboard's server, and a training waits 12 s at its end for the answer.
        yield trainer, "PlacementGroupCleanerCallback", RayTrainCallback


def _no_locations(actors: object) -> dict[str, str]:
    return {}


class _NullActorHandle:
    """An actor handle without an actor: remote calls are no-ops."""

    def __getattr__(self, name: str) -> _NullActorHandle:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def remote(self, *args: object, **options: object) -> None:
        """Do nothing."""


class _WholeCluster:
    """Ray Data's autoscaling client without its actor: a dataset may use every resource of the cluster.

    Ray itself starts no more tasks than fit beside a training's workers.
    """

    def __init__(self, *_: object, **__: object) -> None:
        import ray

        self._resources = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}

    def request_resources(self, *_: object, **__: object) -> None: ...

    def cancel_request(self) -> None: ...

    def get_reserved_resources(self) -> dict[str, dict[str, float]]:
        """Resources by node id."""
        return self._resources
