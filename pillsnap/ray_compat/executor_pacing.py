"""Paces Ray Data's scheduling loop, so that it leaves the cores to decoding."""

from __future__ import annotations

import gc
import math
import time
from contextlib import ExitStack
from typing import Any

from pillsnap.ray_compat.patches import replaced

_SHORTEST_WAIT_S, _LONGEST_WAIT_S = 0.01, 0.15
_PASS_CPU_S = 0.004
"""Processor time of one pass of the scheduling loop."""


def scheduling_pace(tasks_decode: bool) -> type:
    """An execution callback that sets how long the loop waits for finished tasks."""
    import ray
    from ray.data._internal.execution import streaming_executor_state
    from ray.data._internal.execution.execution_callback import ExecutionCallback

    class SchedulingPace(ExecutionCallback):
        """Lets Ray Data poll for finished tasks no more often than it takes to keep the cores busy.

        Its loop waits up to 0.1 s for all running tasks, and only then gives free cores new ones: too long for short
        tasks; for long ones, each pass costs milliseconds of a core. Where no task may start or hand over rows, it
        polls without a pause: on two cores, that takes 80 % of one of them.
        """

        def __init__(self) -> None:
            self._finished = self._made = self._moved = self._running = self._taken = 0
            self._passed_s = 0.0
            self._longest_s = _LONGEST_WAIT_S
            self._stack = ExitStack()

        def before_execution_starts(self, executor: Any) -> None:
            if ray.get_runtime_context().get_actor_id():
                # This process serves the stream alone: searching its imports for garbage would be a fifth of the loop.
                gc.freeze()
                self._stack.callback(gc.unfreeze)
            wait = (streaming_executor_state, "WAIT_FOR_TASK_COMPLETION_TIMEOUT_S", _SHORTEST_WAIT_S)
            self._stack.enter_context(replaced(wait))
            self._wait(_SHORTEST_WAIT_S)

        def after_execution_succeeds(self, executor: Any) -> None:
            self._stack.close()

        def after_execution_fails(self, executor: Any, error: Exception) -> None:
            self._stack.close()

        def on_execution_step(self, executor: Any) -> None:
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
                self._wait(self._wait_s * 1.2)  # the queue held enough
            elif 2 * done >= max(self._running, 1) or rows > max(self._running, 1):
                self._wait(self._wait_s / 2)  # cores may have been idle: no task to run, or too many rows to fetch
            elif not done and finished:
                self._wait(self._wait_s * 1.2)
            self._running = sum(op.num_active_tasks() for op in operators)
            if moved == self._moved and (state.output_queue.num_blocks or self._is_held_back(operators)):
                time.sleep(max(0.0, self._passed_s + self._wait_s - time.monotonic()))
            self._moved, self._passed_s = moved, time.monotonic()

        @staticmethod
        def _best_wait_s(operators: Any, num_cpus: float) -> float:
            """The wait w that costs least where each task has a core.

            A core is idle for w / 2 after each task: idling and passes take w / (2 task_s) + pass_s / (w num_cpus) of
            the cores.
            """
            longest = _LONGEST_WAIT_S
            for op in operators:
                task_s = op.metrics.average_task_completion_time_excl_backpressure_s
                if task_s and op.incremental_resource_usage().cpu >= 1:
                    longest = min(longest, math.sqrt(2 * task_s * _PASS_CPU_S / max(num_cpus, 1.0)))
            return longest

        @staticmethod
        def _is_held_back(operators: Any) -> bool:
            return any(op._in_task_output_backpressure for op in operators)

        def _wait(self, wait_s: float) -> None:
            self._wait_s = min(max(wait_s, _SHORTEST_WAIT_S), self._longest_s)
            streaming_executor_state.WAIT_FOR_TASK_COMPLETION_TIMEOUT_S = self._wait_s

    return SchedulingPace
