"""The wait of Ray Data's scheduling loop, without Ray Data."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from pillsnap.ray_compat import executor_pacing


@pytest.fixture
def pace(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(get_actor_id=lambda: None))
    pace = executor_pacing.scheduling_pace(tasks_decode=True)()
    pace.before_execution_starts(None)
    yield pace
    pace.after_execution_succeeds(None)


class Operator(SimpleNamespace):
    __hash__ = object.__hash__


def operator(task_s: float | None = None, cpus: float = 1.0) -> Any:
    metrics = SimpleNamespace(
        num_tasks_finished=0,
        num_task_outputs_generated=0,
        num_tasks_submitted=0,
        num_outputs_taken=0,
        average_task_completion_time_excl_backpressure_s=task_s,
    )
    return Operator(
        metrics=metrics,
        num_active_tasks=lambda: 2,
        incremental_resource_usage=lambda: SimpleNamespace(cpu=cpus),
        _in_task_output_backpressure=False,
    )


def wait_s() -> float:
    from ray.data._internal.execution import streaming_executor_state

    return streaming_executor_state.WAIT_FOR_TASK_COMPLETION_TIMEOUT_S


def test_the_wait_grows_while_the_queue_holds_enough_and_is_put_back(pace: Any) -> None:
    assert wait_s() == executor_pacing._SHORTEST_WAIT_S
    state = SimpleNamespace(output_queue=SimpleNamespace(num_blocks=3))
    executor = SimpleNamespace(_topology={operator(): state})
    for _ in range(3):
        pace.on_execution_step(executor)
    assert wait_s() == pytest.approx(executor_pacing._SHORTEST_WAIT_S * 1.2**3)
    pace.after_execution_fails(executor, RuntimeError())
    assert wait_s() == 0.1


def test_the_best_wait_balances_idle_cores_and_passes(pace: Any) -> None:
    best = math.sqrt(2 * 0.5 * executor_pacing._PASS_CPU_S / 2)
    assert pace._best_wait_s([operator(0.5)], 2.0) == pytest.approx(best)
    assert pace._best_wait_s([operator(0.5, cpus=0.5)], 2.0) == executor_pacing._LONGEST_WAIT_S
    assert pace._best_wait_s([operator(None), operator(1000.0)], 2.0) == executor_pacing._LONGEST_WAIT_S
