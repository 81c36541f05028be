"""Figures that the device computes and the host reads later, so that it can go on launching work."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

import torch

Of = TypeVar("Of")


def lag_steps(device: torch.device) -> int:
    """Steps after which a step's figures are read: on a GPU it always has the next two to work on meanwhile. The same
    number on every worker, since workers act together on what they read.
    """
    return 2 if device.type == "cuda" else 0


class Readings(Generic[Of]):
    """Small tensors on their way to the host, in order, each with what it belongs to."""

    def __init__(self, device: torch.device) -> None:
        self._lag = lag_steps(device)
        self._pending: deque[tuple[Of, torch.Tensor, torch.cuda.Event | None]] = deque()

    def send(self, values: torch.Tensor, of: Of) -> None:
        """Start to copy `values` (n,), one call a step."""
        if values.device.type == "cuda":
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            host.copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._pending.append((of, host, event))
        else:
            self._pending.append((of, values, None))

    def due(self) -> Iterator[tuple[Of, list[float]]]:
        """Those that are old enough to be there without waiting for the steps after them."""
        yield from self._take(self._lag)

    def all(self) -> Iterator[tuple[Of, list[float]]]:
        """All that were sent; waits for the device."""
        yield from self._take(0)

    def _take(self, left: int) -> Iterator[tuple[Of, list[float]]]:
        while len(self._pending) > left:
            of, values, event = self._pending.popleft()
            if event is not None:
                event.synchronize()
            yield of, values.tolist()
