"""A consumer that has no rows sleeps until there may be some."""

from __future__ import annotations

import threading
import time

import pytest

from pillsnap.ray_compat import executor_pacing


def test_a_consumer_wakes_when_the_loop_has_looked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor_pacing, "_LONGEST_WAIT_S", 600.0)
    consumer = threading.Thread(target=executor_pacing._ConsumersClock().sleep, args=(0.01,), daemon=True)
    consumer.start()
    consumer.join(0.2)
    assert consumer.is_alive()
    executor_pacing._wake_consumers()
    consumer.join(60)
    assert not consumer.is_alive()


def test_it_wakes_by_itself_where_nobody_says_so() -> None:
    started_s = time.monotonic()
    executor_pacing._ConsumersClock().sleep(0.01)
    assert time.monotonic() - started_s >= 0.99 * executor_pacing._LONGEST_WAIT_S


def test_it_is_the_time_otherwise() -> None:
    assert executor_pacing._ConsumersClock().perf_counter is time.perf_counter
