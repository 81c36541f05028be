"""Measures one loader for a fixed time: rate, first batch, gap between epochs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Any

Batches = Iterator[tuple[int, Any]]
"""Endless (epoch, batch); the first dimension of a batch is images."""
WARM_UP_S = 4.0
PACE = 0.7
MOST_GAPS, LONGEST_GAP_SEARCH_S = 3, 12.0


def measure(batches: Batches, started_s: float, seconds: float, gap: bool) -> dict[str, float]:
    """Images per second over `seconds` after a warm-up, the unix times of its start and end, seconds from the unix time
    `started_s` to the first batch, and, if `gap`, the gap between epochs.

    The gap: seconds that a loop which consumes at `PACE` of that rate waits at the first step of an epoch, minus its
    wait at other steps; NaN if no epoch began, or if each has one step.
    """
    next(batches)
    first_batch_s = time.time() - started_s
    begin = time.perf_counter()
    while time.perf_counter() - begin < WARM_UP_S:
        next(batches)
    images = steps = 0
    begin_s = time.time()
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds:
        epoch, batch = next(batches)
        batch[0, 0, 0]  # touches the data
        images, steps = images + len(batch), steps + 1
    took_s = time.perf_counter() - begin
    end_s = time.time()
    gap_s = _epoch_gap(batches, epoch, took_s / steps / PACE) if gap else float("nan")
    return {
        "images_per_s": images / took_s, "steady_from_s": begin_s, "steady_to_s": end_s,
        "first_batch_s": first_batch_s, "epoch_gap_s": gap_s,
    }  # fmt: skip


def _epoch_gap(batches: Batches, epoch: int, step_s: float) -> float:
    waits: list[float] = []
    gaps: list[float] = []
    begin = time.perf_counter()
    while len(gaps) < MOST_GAPS and time.perf_counter() - begin < LONGEST_GAP_SEARCH_S:
        asked_s = time.perf_counter()
        following, _ = next(batches)
        came_s = time.perf_counter()
        (waits if following == epoch else gaps).append(came_s - asked_s)
        epoch = following
        time.sleep(step_s)
    return max(0.0, statistics.median(gaps) - statistics.median(waits)) if gaps and waits else float("nan")
