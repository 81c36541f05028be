"""How Ray Data's scheduling loop runs a stream: in order, a row a block, at a pace that leaves the cores to decoding.

It touches parts of Ray Data that are not its public interface, which is why ray is held to one minor version.
"""

from __future__ import annotations

import gc
import math
import threading
import time
from typing import Any

from pillsnap.ray_compat.locality import NearWorkers
from pillsnap.ray_compat.minimal_cluster import leave_out_actors

_SHORTEST_WAIT_S, _LONGEST_WAIT_S = 0.01, 0.15
_LOOK_CPU_S = 0.004
"""Processor time that one pass of the scheduling loop takes."""
_has_looked = threading.Condition()


def execution_options() -> Any:
    """Ray Data options under which rows reach the workers in the plan's order."""
    from ray.data import ExecutionOptions

    return ExecutionOptions(preserve_order=True)


class RowBlocks:
    """A Ray Data context in which every row is a block of its own; the caller's context comes back after.

    No more than `rows_ahead` rows are made before they are asked for; None leaves that to Ray Data, which limits bytes.
    With `near`, tasks run on the nodes that it says. A task makes `rows_per_task` without waiting for Ray Data to look.
    """

    def __init__(self, rows_ahead: int | None = None, near: NearWorkers | None = None, rows_per_task: int = 1) -> None:
        self._rows_ahead, self._near, self._rows_per_task = rows_ahead, near, rows_per_task

    def __enter__(self) -> None:
        from ray.data import DataContext
        from ray.data._internal.execution import backpressure_policy as policies

        self.before = DataContext.get_current()
        context = self.before.copy()
        context.target_max_block_size = context.target_min_block_size = 1
        context.execution_options = execution_options()
        context.enable_progress_bars = False
        kept = context._max_num_blocks_in_streaming_gen_buffer or self._rows_per_task
        context._max_num_blocks_in_streaming_gen_buffer = max(kept, self._rows_per_task)
        context.custom_execution_callback_classes = [_scheduling_pace(self._near, self._rows_ahead is None)]
        if self._rows_ahead is not None:
            enabled = [*policies.ENABLED_BACKPRESSURE_POLICIES, _row_limit(self._rows_ahead)]
            context.set_config(policies.ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, enabled)
        DataContext._set_current(context)

    def __exit__(self, *_: object) -> None:
        from ray.data import DataContext

        DataContext._set_current(self.before)


class _ConsumersClock:
    """The `time` of the module in which a consumer of rows sleeps while there are none: it looks again when the
    scheduling loop has, instead of 100 times a second.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    @staticmethod
    def sleep(seconds: float) -> None:
        """Until the loop has looked; or nearly as long as that takes at most, where nobody says when it has."""
        with _has_looked:
            _has_looked.wait(_LONGEST_WAIT_S)


def _wake_consumers() -> None:
    with _has_looked:
        _has_looked.notify_all()


def _scheduling_pace(near: NearWorkers | None, tasks_decode: bool) -> type:
    import ray
    from ray.data._internal.execution import streaming_executor_state
    from ray.data._internal.execution.execution_callback import ExecutionCallback

    from pillsnap.ray_compat.lazy_source import teach_planner

    class SchedulingPace(ExecutionCallback):
        """Lets Ray Data look for finished tasks no more often than it takes to keep the cores busy.

        Its scheduling loop waits for all running tasks, 0.1 s at most, and only then gives free cores new ones: too
        long for short tasks, and for long ones each look costs some milliseconds of a core. It also looks again at once
        where no task may run or hand over what it made: measured on two cores, it spends 80 % of one of them on that.
        """

        def __init__(self) -> None:
            # Ray Data makes its callbacks before it plans, in the process that will execute.
            teach_planner()
            leave_out_actors()
            streaming_executor_state.time = _ConsumersClock()
            self._finished = self._made = self._moved = self._running = self._taken = 0
            self._looked_s = 0.0
            self._longest_s = _LONGEST_WAIT_S

        def before_execution_starts(self, executor: Any) -> None:
            if ray.get_runtime_context().get_actor_id():
                # This process is there for the stream alone, and what it has imported stays: looking through that for
                # garbage would be a fifth of what the loop costs.
                gc.freeze()
            self._wait(_SHORTEST_WAIT_S)
            if near is not None:
                near.attach(executor._topology)

        def on_execution_step(self, executor: Any) -> None:
            _wake_consumers()
            operators = executor._topology
            finished = sum(op.metrics.num_tasks_finished for op in operators)
            made = sum(op.metrics.num_task_outputs_generated for op in operators)
            moved = finished + made + sum(op.metrics.num_tasks_submitted for op in operators)
            done, self._finished = finished - self._finished, finished
            rows, self._made = made - self._made, made
            if done and tasks_decode:
                self._longest_s = self._best_wait_s(operators, executor._resource_manager.get_global_limits().cpu)
            last, state = list(operators.items())[-1]
            taken, self._taken = last.metrics.num_outputs_taken - self._taken, last.metrics.num_outputs_taken
            if state.output_queue.num_blocks > taken:
                self._wait(self._wait_s * 1.2)  # what was there at the last look was enough
            elif 2 * done >= max(self._running, 1) or rows > max(self._running, 1):
                self._wait(self._wait_s / 2)  # cores may have stood still: no task to run, or too many rows to fetch
            elif not done and finished:
                self._wait(self._wait_s * 1.2)
            self._running = sum(op.num_active_tasks() for op in operators)
            if moved == self._moved and (state.output_queue.num_blocks or self._is_held_back(operators)):
                time.sleep(max(0.0, self._looked_s + self._wait_s - time.monotonic()))
            self._moved, self._looked_s = moved, time.monotonic()

        @staticmethod
        def _best_wait_s(operators: Any, num_cpus: float) -> float:
            """Where tasks have a core each, one stands still for half a wait after each task; with the wait w, that
            and the looks take w / (2 task_s) + look_s / (w num_cpus) of the cores, which is least at this w.
            """
            longest = _LONGEST_WAIT_S
            for op in operators:
                task_s = op.metrics.average_task_completion_time_excl_backpressure_s
                if task_s and op.incremental_resource_usage().cpu >= 1:
                    longest = min(longest, math.sqrt(2 * task_s * _LOOK_CPU_S / max(num_cpus, 1.0)))
            return longest

        @staticmethod
        def _is_held_back(operators: Any) -> bool:
            return any(op._in_task_output_backpressure for op in operators)

        def _wait(self, wait_s: float) -> None:
            self._wait_s = min(max(wait_s, _SHORTEST_WAIT_S), self._longest_s)
            streaming_executor_state.WAIT_FOR_TASK_COMPLETION_TIMEOUT_S = self._wait_s

    return SchedulingPace


def _row_limit(rows_ahead: int) -> type:
    from ray.data._internal.execution.backpressure_policy.backpressure_policy import BackpressurePolicy

    class RowLimit(BackpressurePolicy):
        """Keeps tasks from running far ahead where rows are too small for limits in bytes to hold them."""

        def can_add_input(self, op: Any) -> bool:
            made = [(each, state) for each, state in self._topology.items() if each.input_dependencies]
            rows = sum(state.output_queue.num_blocks + each.num_active_tasks() for each, state in made)
            return rows + op.metrics.obj_store_mem_internal_outqueue_blocks < rows_ahead

    return RowLimit
