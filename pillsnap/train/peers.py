"""What the workers of one run tell each other; with one worker, nothing leaves the process."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
import torch.distributed as dist


class Peers:
    """Sums, gathers and agreements over all workers. Every worker must make the same calls in the same order."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        started = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if started else 0
        self.count = dist.get_world_size() if started else 1

    def sum(self, values: torch.Tensor) -> list[float]:
        """Element-wise sum over the workers, on the host."""
        if self.count > 1:
            values = values.to(self._device, torch.float64, copy=True)
            dist.all_reduce(values)
        return values.tolist()

    def any(self, flag: bool) -> bool:
        """Whether any worker says so."""
        return self.sum(torch.tensor([float(flag)]))[0] > 0 if self.count > 1 else flag

    def gather(self, items: list[Any]) -> list[Any]:
        """The workers' lists, one after the other, on every worker."""
        if self.count == 1:
            return items
        everyone: list[Any] = [None] * self.count
        dist.all_gather_object(everyone, items)
        return list(chain.from_iterable(everyone))
