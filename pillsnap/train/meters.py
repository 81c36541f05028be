"""Running mean of the loss, and throughput, of the training loop."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from pillsnap.data.loader import DeviceBatch


class RunningMean:
    """Mean of an epoch's losses so far; kept in checkpoints."""

    def __init__(self, progress: Mapping[str, Any]) -> None:
        """`progress` is that of the checkpoint."""
        self._sum, self._count = progress.get("loss_sum", 0.0), progress.get("loss_count", 0)

    def clear(self) -> None:
        """Start the next epoch."""
        self._sum, self._count = 0.0, 0

    def add(self, value: float) -> None:
        """Count one value; non-finite values are left out."""
        if math.isfinite(value):
            self._sum, self._count = self._sum + value, self._count + 1

    @property
    def mean(self) -> float:
        return self._sum / max(self._count, 1)

    @property
    def progress(self) -> dict[str, float]:
        """Kept in checkpoints."""
        return {"loss_sum": self._sum, "loss_count": self._count}


class Throughput:
    """Images per second, fraction of time spent waiting for data, and time left."""

    def __init__(self, images_left: int) -> None:
        self.images_left = images_left
        self._epoch = _Window()
        self._recent = _Window()
        self._rate, self._wait = 0.0, 0.0

    def step(self, images: int, batch: DeviceBatch) -> None:
        """Count one step: images of all workers, and the loading times of this worker's batch."""
        self.images_left -= images
        self._epoch.add(images, batch)
        self._recent.add(images, batch)

    def recent(self) -> dict[str, float | None]:
        """Since the last call: `images_per_s`, `data_wait_fraction`, and `eta_s` for the training steps left.

        Results of several steps may be read at once: without a step since the last call its figures hold.
        """
        if self._recent.images:
            self._rate, self._wait = self._recent.rate(), self._recent.wait_fraction()
            self._recent = _Window()
        eta_s = self.images_left / self._rate if self._rate else None
        return {"images_per_s": self._rate, "data_wait_fraction": self._wait, "eta_s": eta_s}

    def epoch(self) -> dict[str, Any]:
        """Since the epoch's start: `images_per_s`, `data_wait_fraction`, `duration_s`, and `loader_ms`, the
        milliseconds per image in each stage of the loader. Starts the next epoch.
        """
        rates = {
            "images_per_s": self._epoch.rate(),
            "data_wait_fraction": self._epoch.wait_fraction(),
            "duration_s": self._epoch.elapsed_s(),
            "loader_ms": self._epoch.loader_ms(),
        }
        self.start_epoch()
        return rates

    def start_epoch(self) -> None:
        """Start to count an epoch now."""
        self._epoch, self._recent = _Window(), _Window()


class _Window:
    def __init__(self) -> None:
        self._start_s = time.perf_counter()
        self.images = self._own_images = 0
        self._wait_s = 0.0
        self._stage_s: Counter[str] = Counter()

    def add(self, images: int, batch: DeviceBatch) -> None:
        self.images += images
        self._own_images += batch.num_valid
        self._wait_s += batch.wait_s
        self._stage_s.update(batch.stage_s)

    def loader_ms(self) -> dict[str, float]:
        return {name: 1000 * seconds / max(self._own_images, 1) for name, seconds in self._stage_s.items()}

    def elapsed_s(self) -> float:
        return max(time.perf_counter() - self._start_s, 1e-9)

    def rate(self) -> float:
        return self.images / self.elapsed_s()

    def wait_fraction(self) -> float:
        return min(1.0, self._wait_s / self.elapsed_s())
