"""One loader over a fixed time: rate, first batch, gap between epochs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Any

Batches = Iterator[tuple[int, Any]]
"""(epoch, batch) over and over; a batch is an array or tensor whose first dimension counts images."""
WARM_UP_S = 4.0


def measure(batches: Batches, started_s: float, seconds: float) -> dict[str, float]:
    """Images a second over `seconds` after a warm-up, seconds to the first batch since the unix time `started_s`, and
    the median of what the step from one epoch to the next takes beyond an ordinary step.
    """
    epoch, batch = next(batches)
    first_batch_s = time.time() - started_s
    begin = time.perf_counter()
    while time.perf_counter() - begin < WARM_UP_S:
        epoch, batch = next(batches)
    images, steps, gaps = 0, [], []
    begin = before = time.perf_counter()
    while before - begin < seconds:
        following, batch = next(batches)
        batch[0, 0, 0]  # the first bytes are there
        images += len(batch)
        now = time.perf_counter()
        (steps if following == epoch else gaps).append(now - before)
        epoch, before = following, now
    gap_s = statistics.median(gaps) - statistics.median(steps) if gaps else float("nan")
    return {"images_per_s": images / (before - begin), "first_batch_s": first_batch_s, "epoch_gap_s": max(0.0, gap_s)}
