"""The Ray Data context in which a stream is built: rows in order, each a block of its own, made a little ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from pillsnap.ray_compat import capabilities


def execution_options() -> Any:
    """Ray Data options under which rows reach the workers in the plan's order."""
    from ray.data import ExecutionOptions

    return ExecutionOptions(preserve_order=True)


@contextmanager
def in_order() -> Iterator[Any]:
    """A copy of the current Ray Data context whose datasets keep the order of their rows; yields it."""
    from ray.data import DataContext

    context = DataContext.get_current().copy()
    context.execution_options = execution_options()
    context.enable_progress_bars = False
    with DataContext.current(context):
        yield context


@contextmanager
def row_blocks(rows_ahead: int | None = None, rows_per_task: int = 1) -> Iterator[None]:
    """A Ray Data context in which every row is a block of its own.

    At most `rows_ahead` rows are made before they are consumed; None leaves the limit, in bytes, to Ray Data. A task
    makes `rows_per_task` rows without waiting for Ray Data's scheduling loop.
    """
    with in_order() as context:
        context.target_max_block_size = context.target_min_block_size = 1
        context.custom_execution_callback_classes = list(_callbacks(tasks_decode=rows_ahead is None))
        if capabilities.rows_per_task():
            kept = context._max_num_blocks_in_streaming_gen_buffer or 1
            context._max_num_blocks_in_streaming_gen_buffer = max(kept, rows_per_task)
        if rows_ahead is not None and capabilities.rows_ahead():
            from ray.data._internal.execution import backpressure_policy as policies

            enabled = [*policies.ENABLED_BACKPRESSURE_POLICIES, _row_limit(rows_ahead)]
            context.set_config(policies.ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, enabled)
        yield


def _callbacks(tasks_decode: bool) -> Iterator[type]:
    """Ray Data makes one object of each class before it plans, in the process that executes the dataset."""
    if not capabilities.executor_callbacks():
        return
    from pillsnap.ray_compat.minimal_cluster import without_helper_actors

    adapters: list[Callable[[], AbstractContextManager[None]]] = [without_helper_actors]
    if capabilities.lazy_source():
        from pillsnap.ray_compat.lazy_source import planning_reads

        adapters.append(planning_reads)
    yield _within(adapters)
    if capabilities.executor_pacing():
        from pillsnap.ray_compat.executor_pacing import scheduling_pace

        yield scheduling_pace(tasks_decode)


def _within(adapters: list[Callable[[], AbstractContextManager[None]]]) -> type:
    from ray.data._internal.execution.execution_callback import ExecutionCallback

    class Within(ExecutionCallback):
        """Enters the adapters at planning and leaves them after the execution."""

        def __init__(self) -> None:
            self._stack = ExitStack()
            for adapter in adapters:
                self._stack.enter_context(adapter())

        def after_execution_succeeds(self, executor: Any) -> None:
            self._stack.close()

        def after_execution_fails(self, executor: Any, error: Exception) -> None:
            self._stack.close()

    return Within


def _row_limit(rows_ahead: int) -> type:
    from ray.data._internal.execution.backpressure_policy.backpressure_policy import BackpressurePolicy

    class RowLimit(BackpressurePolicy):
        """Limits tasks by rows, where rows are too small for limits in bytes to matter."""

        def can_add_input(self, op: Any) -> bool:
            made = [(each, state) for each, state in self._topology.items() if each.input_dependencies]
            rows = sum(state.output_queue.num_blocks + each.num_active_tasks() for each, state in made)
            return rows + op.metrics.obj_store_mem_internal_outqueue_blocks < rows_ahead

    return RowLimit
