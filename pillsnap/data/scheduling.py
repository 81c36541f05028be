"""How Ray Data's scheduling loop runs a stream: in order, a batch a block, at a pace that leaves the cores to decoding.

It touches parts of Ray Data that are not its public interface, which is why ray is held to one minor version.
"""

from __future__ import annotations

import time
from typing import Any

LISTING = "list_reads"
"""In the name of the operator that lists what is to be read."""
_MAX_LISTED = 64
_POLL_S, _LONGEST_REST_S = 0.02, 0.04


def execution_options() -> Any:
    """Ray Data options under which rows reach the workers in the plan's order."""
    from ray.data import ExecutionOptions

    return ExecutionOptions(preserve_order=True)


class BatchBlocks:
    """A Ray Data context in which every row, a whole batch, is a block of its own; the caller's context comes back
    after.
    """

    def __enter__(self) -> None:
        from ray.data import DataContext
        from ray.data._internal.execution import backpressure_policy as policies

        self.before = DataContext.get_current()
        context = self.before.copy()
        context.target_max_block_size = context.target_min_block_size = 1
        context.execution_options = execution_options()
        context.enable_progress_bars = False
        context.custom_execution_callback_classes = [_scheduling_pace()]
        enabled = [*policies.ENABLED_BACKPRESSURE_POLICIES, _listing_limit()]
        context.set_config(policies.ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, enabled)
        DataContext._set_current(context)

    def __exit__(self, *_: object) -> None:
        from ray.data import DataContext

        DataContext._set_current(self.before)


def _scheduling_pace() -> type:
    from ray.data._internal.execution import streaming_executor_state
    from ray.data._internal.execution.execution_callback import ExecutionCallback

    class SchedulingPace(ExecutionCallback):
        """Looks for finished tasks more often than Ray Data does, and rests when there is nothing to do.

        Its scheduling loop waits up to 0.1 s for all running tasks, and only then gives free cores new ones. And it
        asks again at once while output waits that it may not take yet: measured on two cores, it spends 80 % of one of
        them on nothing.
        """

        def __init__(self) -> None:
            self._moved, self._rest_s = 0, 0.0

        def before_execution_starts(self, executor: Any) -> None:
            streaming_executor_state.WAIT_FOR_TASK_COMPLETION_TIMEOUT_S = _POLL_S

        def on_execution_step(self, executor: Any) -> None:
            operators = executor._topology
            moved = sum(op.metrics.num_task_outputs_generated + op.metrics.num_tasks_submitted for op in operators)
            if moved != self._moved:
                self._moved, self._rest_s = moved, 0.0
            elif any(op._in_task_output_backpressure for op in operators):
                self._rest_s = min(self._rest_s + _POLL_S / 2, _LONGEST_REST_S)
                time.sleep(self._rest_s)

    return SchedulingPace


def _listing_limit() -> type:
    from ray.data._internal.execution.backpressure_policy.backpressure_policy import BackpressurePolicy

    class ListingLimit(BackpressurePolicy):
        """Lets reads be listed only a little ahead: their blocks are too small for limits in bytes to hold them."""

        def max_task_output_bytes_to_read(self, op: Any) -> int | None:
            if LISTING not in op.name:
                return None
            return 0 if self._topology[op].output_queue.num_blocks > _MAX_LISTED else None

    return ListingLimit
