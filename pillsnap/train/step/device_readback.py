"""Reads values from the device some steps later, so that the host can keep launching work."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

import torch

ContextT = TypeVar("ContextT")


def lag_steps(device: torch.device) -> int:
    """Steps by which reads lag: 2 on a GPU, which keeps two steps queued, else 0. Equal on all workers, which act
    together on the values.
    """
    return 2 if device.type == "cuda" else 0


class DeviceReadback(Generic[ContextT]):
    """Queue of small tensors that are copied to the host, each with its context."""

    def __init__(self, device: torch.device) -> None:
        self._lag = lag_steps(device)
        self._pending: deque[tuple[ContextT, torch.Tensor, torch.cuda.Event | None]] = deque()

    def send(self, values: torch.Tensor, context: ContextT) -> None:
        """Start to copy `values` (n,); one call per step."""
        if values.device.type == "cuda":
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            host.copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._pending.append((context, host, event))
        else:
            self._pending.append((context, values, None))

    def due(self) -> Iterator[tuple[ContextT, list[float]]]:
        """Values at least `lag_steps` old; does not wait for the steps after them."""
        yield from self._take(self._lag)

    def all(self) -> Iterator[tuple[ContextT, list[float]]]:
        """All values sent; waits for the device."""
        yield from self._take(0)

    def _take(self, num_left: int) -> Iterator[tuple[ContextT, list[float]]]:
        while len(self._pending) > num_left:
            context, values, event = self._pending.popleft()
            if event is not None:
                event.synchronize()
            yield context, values.tolist()
