"""Which adapters work on the installed Ray, found by probing names and signatures, never versions.

`PILLSNAP_RAY=public` turns every adapter off: the samples and their order stay the same, only slower.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache, wraps
from typing import Any, get_origin

from pillsnap.errors import UserError
from pillsnap.ray_compat.patches import original

VARIABLE = "PILLSNAP_RAY"


@dataclass(frozen=True)
class Capabilities:
    """One flag per adapter; see docs/ray-internals.md."""

    loopback: bool
    import_path: bool
    minimal_head: bool
    worker_command: bool
    no_stats_actor: bool
    no_location_actor: bool
    no_autoscaling_actor: bool
    no_cleaner_actor: bool
    executor_callbacks: bool
    lazy_source: bool
    executor_pacing: bool
    rows_ahead: bool
    rows_per_task: bool
    locality: bool
    ordered_actors: bool

    def __str__(self) -> str:
        names = {field.name: bool(getattr(self, field.name)) for field in fields(self)}
        off = [name for name, works in names.items() if not works]
        if public_only():
            return f"Ray's public API only ({VARIABLE}=public)"
        if not off:
            return f"all {len(names)} adapters for Ray work"
        return f"{len(names) - len(off)} of {len(names)} adapters for Ray work; public API instead of {', '.join(off)}"


@cache
def capabilities() -> Capabilities:
    """Probe the installed Ray, once per process."""
    return Capabilities(**{field.name: globals()[field.name]() for field in fields(Capabilities)})


def public_only() -> bool:
    """Whether every adapter is turned off. Raises UserError for another value than `public`."""
    value = os.environ.get(VARIABLE, "")
    if value not in ("", "public"):
        raise UserError(f"{VARIABLE}={value} is not known: the only value is 'public'.")
    return bool(value)


def forget() -> None:
    """Probe again at the next question; for tests that change Ray or the environment."""
    for probe in [capabilities, *_probes]:
        probe.cache_clear()


_probes: list[Any] = []


def _probe(find: Callable[[], bool]) -> Callable[[], bool]:
    """Caches a probe; what is missing or turned off makes it False."""

    @cache
    @wraps(find)
    def found() -> bool:
        if public_only():
            return False
        try:
            return find()
        except (ImportError, AttributeError, TypeError, ValueError):  # the last two: no signature
            return False

    _probes.append(found)
    return found


def _names(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def _takes(function: Callable[..., Any], *names: str) -> bool:
    """Whether the parameters have these names, in this order."""
    return _names(function) == names


def _uses(function: Any, *names: str) -> bool:
    """Whether the function names these attributes; instances have them, classes do not."""
    return set(names) <= set(inspect.unwrap(function).__code__.co_names)


@_probe
def loopback() -> bool:
    """A local node can have the address 127.0.0.1."""
    from ray._private import ray_constants, services

    original(ray_constants, "ENABLE_RAY_CLUSTER")
    return _uses(services.get_node_ip_address, "ENABLE_RAY_CLUSTER", "get_localhost_ip")


@_probe
def import_path() -> bool:
    """A driver's working directory can be kept off the import path of its workers."""
    from ray._private import worker
    from ray.job_config import JobConfig

    return "_client_job" in _names(JobConfig) and _uses(worker.connect, "_client_job", "_py_driver_sys_path")


@_probe
def minimal_head() -> bool:
    """Processes of the head node can be left out."""
    from ray._private import node as nodes
    from ray._private import ray_constants, services, utils
    from ray._private.node import Node

    waits = _names(original(nodes, "wait_for_persisted_port"))
    return (
        isinstance(ray_constants.PROCESS_TYPE_DASHBOARD_AGENT, str)
        and isinstance(ray_constants.PROCESS_TYPE_RUNTIME_ENV_AGENT, str)
        and _takes(
            services._build_python_executable_command_memory_profileable, "component", "session_dir", "unbuffered"
        )
        and _takes(Node.start_api_server, "self", "include_dashboard", "raise_on_failure")
        and waits[:4] == ("dir", "node_id", "port_name", "timeout_ms")
        and _takes(nodes.get_port_filename, "node_id", "port_name")
        and _takes(Node.start_monitor, "self")
        and _takes(Node.start_log_monitor, "self")
        and _takes(utils.get_dashboard_dependency_error)
    )


@_probe
def worker_command() -> bool:
    """Ray starts workers by a program that can be another one."""
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    return "setup_worker_path" in _names(RayParams) and _uses(
        original(Node, "start_raylet"), "_ray_params", "setup_worker_path"
    )


@_probe
def no_stats_actor() -> bool:
    """Ray Data runs without the actor that collects statistics for the dashboard."""
    from ray.data._internal import stats

    return _takes(original(stats, "get_or_create_stats_actor"))


@_probe
def no_location_actor() -> bool:
    """Pools run without the actor that stores their processes' nodes."""
    from ray.data._internal.execution.operators import actor_pool_map_operator as pool

    locations = original(pool, "get_actor_locations")
    return _takes(original(pool, "get_or_create_actor_location_tracker")) and "logical_actor_ids" in _names(locations)


@_probe
def no_autoscaling_actor() -> bool:
    """Ray Data runs without the actor that divides the cluster among datasets."""
    from ray.data._internal.cluster_autoscaler import rate_based_cluster_autoscaler as autoscaler

    coordinator = original(autoscaler, "DefaultAutoscalingCoordinator")
    return (
        "resources" in _names(coordinator.request_resources)
        and _takes(coordinator.cancel_request, "self")
        and _takes(coordinator.get_reserved_resources, "self")
        and get_origin(inspect.signature(coordinator.get_reserved_resources).return_annotation) is dict
    )


@_probe
def no_cleaner_actor() -> bool:
    """Ray Train runs without the actor that frees resources after the death of a training's controller."""
    from ray.train.v2._internal.execution.callback import RayTrainCallback
    from ray.train.v2.api import data_parallel_trainer as trainer

    cleaner = original(trainer, "PlacementGroupCleanerCallback")
    without = all(each.default is not each.empty for each in inspect.signature(cleaner).parameters.values())
    return without and issubclass(cleaner, RayTrainCallback)


@_probe
def executor_callbacks() -> bool:
    """Ray Data calls classes of ours in the process that executes a dataset."""
    from ray.data import DataContext
    from ray.data._internal.execution.execution_callback import ExecutionCallback

    return (
        _takes(ExecutionCallback.before_execution_starts, "self", "executor")
        and _takes(ExecutionCallback.on_execution_step, "self", "executor")
        and _takes(ExecutionCallback.after_execution_succeeds, "self", "executor")
        and _takes(ExecutionCallback.after_execution_fails, "self", "executor", "error")
        and "custom_execution_callback_classes" in {field.name for field in fields(DataContext)}
    )


@_probe
def lazy_source() -> bool:
    """Ray Data plans a source of our own."""
    from ray.data import Dataset
    from ray.data._internal.execution.interfaces import BlockEntry, RefBundle
    from ray.data._internal.execution.operators.input_data_buffer import InputDataBuffer
    from ray.data._internal.logical.interfaces import LogicalOperator, LogicalPlan, SourceOperator
    from ray.data._internal.planner.planner import Planner
    from ray.data._internal.stats import DatasetStats
    from ray.data.block import BlockMetadata

    return (
        executor_callbacks()
        and isinstance(Planner._DEFAULT_PLAN_FNS, dict)
        and _names(Dataset)[:3] == ("logical_plan", "context", "in_stats")
        and _takes(LogicalPlan, "dag", "context")
        and {"metadata", "parent"} <= set(_names(DatasetStats))
        and _names(InputDataBuffer)[:2] == ("data_context", "input_data")
        and _takes(InputDataBuffer.start, "self", "options", "block_ref_counter")
        and _takes(InputDataBuffer._get_next_inner, "self")
        and {"has_next", "throttling_disabled", "has_execution_finished"} <= set(dir(InputDataBuffer))
        and {"infer_metadata", "infer_schema", "num_outputs"} <= set(dir(LogicalOperator))
        and "output_data" in dir(SourceOperator)
        and {"blocks", "owns_blocks", "schema"} <= set(_names(RefBundle))
        and len(_names(BlockEntry)) >= 2
        and {"num_rows", "size_bytes", "input_files", "exec_stats"} <= set(_names(BlockMetadata))
    )


@_probe
def executor_pacing() -> bool:
    """The scheduling loop's wait can be set while it runs."""
    from ray.data._internal.execution import streaming_executor_state
    from ray.data._internal.execution.interfaces import PhysicalOperator
    from ray.data._internal.execution.interfaces.op_runtime_metrics import OpRuntimeMetrics
    from ray.data._internal.execution.resource_manager import ResourceManager
    from ray.data._internal.execution.streaming_executor import StreamingExecutor

    return (
        executor_callbacks()
        and isinstance(streaming_executor_state.WAIT_FOR_TASK_COMPLETION_TIMEOUT_S, int | float)
        and _uses(StreamingExecutor.execute, "_topology", "_resource_manager")
        and _uses(PhysicalOperator.__init__, "_in_task_output_backpressure")
        and _takes(ResourceManager.get_global_limits, "self")
        and {"num_tasks_finished", "num_task_outputs_generated", "num_tasks_submitted", "num_outputs_taken"}
        <= set(dir(OpRuntimeMetrics))
        and "average_task_completion_time_excl_backpressure_s" in dir(OpRuntimeMetrics)
    )


@_probe
def rows_ahead() -> bool:
    """Tasks can be held back by a number of rows."""
    from ray.data._internal.execution import backpressure_policy as policies
    from ray.data._internal.execution.backpressure_policy.backpressure_policy import BackpressurePolicy

    return (
        isinstance(policies.ENABLED_BACKPRESSURE_POLICIES, list)
        and isinstance(policies.ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, str)
        and _takes(BackpressurePolicy.can_add_input, "self", "op")
        and _uses(BackpressurePolicy.__init__, "_topology")
    )


@_probe
def rows_per_task() -> bool:
    """A task may make several blocks before the first is taken."""
    from ray.data import DataContext

    return "_max_num_blocks_in_streaming_gen_buffer" in vars(DataContext.get_current())


@_probe
def locality() -> bool:
    """Each task of an operator can be given a node."""
    from ray.data._internal.execution.operators.map_operator import MapOperator
    from ray.data._internal.execution.operators.task_pool_map_operator import TaskPoolMapOperator
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return (
        lazy_source()  # hands over the operator
        and _takes(TaskPoolMapOperator._get_dynamic_ray_remote_args, "self", "input_bundle")
        and _uses(MapOperator.__init__, "_next_data_task_idx", "_data_tasks")
        and {"node_id", "soft", "_spill_on_unavailable"} <= set(_names(NodeAffinitySchedulingStrategy))
    )


@_probe
def ordered_actors() -> bool:
    """Actors of a pool accept `allow_out_of_order_execution`."""
    from ray._common.ray_option_utils import actor_options

    return "allow_out_of_order_execution" in actor_options
