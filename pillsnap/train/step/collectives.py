"""Collectives across training workers; with one worker, all of them are local."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import timedelta
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist

from pillsnap.train.step.device_readback import DeviceReadback, lag_steps

_COMPILATION_S = 1200.0
"""Time that a worker waits for others which compile: several times the 100 to 170 s that a model took on a GPU."""


class WorkerGroup:
    """Sums and gathers over all workers. Every worker must make the same calls in the same order.

    `timeout_s` is the time after which a collective fails; torch's own setting if None.
    """

    def __init__(self, device: torch.device, timeout_s: float | None = None) -> None:
        self._device, self._timeout_s, self._waits = device, timeout_s, False
        started = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if started else 0
        self.size = dist.get_world_size() if started else 1
        self.lag_steps = lag_steps(device) if self.size > 1 else 0
        """Steps after which the result of `sum_later` is available without waiting."""

    def wait_for_compilation(self, waits: bool) -> None:
        """Let the collectives from now on wait for workers that compile, or end that."""
        if self.size > 1 and self._timeout_s is not None and waits != self._waits:
            _set_timeout(timedelta(seconds=max(self._timeout_s, _COMPILATION_S) if waits else self._timeout_s))
            self._waits = waits

    def sum(self, values: torch.Tensor) -> list[float]:
        """Element-wise sum over the workers, on the host."""
        return self.sum_on_device(values).tolist()

    def sum_on_device(self, values: torch.Tensor) -> torch.Tensor:
        """Element-wise sum over the workers, without a host sync; float64 when there are several workers."""
        if self.size == 1:
            return values
        total = values.to(self._device, torch.float64, copy=True)
        dist.all_reduce(total)
        return total

    def sum_later(self, values: torch.Tensor) -> Callable[[], list[float]]:
        """Start the element-wise sum of `values` (on the host); the function returned waits for it."""
        if self.size == 1 or self._device.type != "cuda":
            return lambda: self.sum(values)
        total = values.pin_memory().to(self._device, torch.float64, non_blocking=True)
        dist.all_reduce(total)
        readback: DeviceReadback[None] = DeviceReadback(self._device)
        readback.send(total, None)
        return lambda: next(readback.all())[1]

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any worker."""
        return self.sum(torch.tensor([float(flag)]))[0] > 0 if self.size > 1 else flag

    def gather(self, items: list[Any]) -> list[Any]:
        """The workers' lists, concatenated by rank, on every worker."""
        if self.size == 1:
            return items
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, items)
        return list(chain.from_iterable(gathered))


def _set_timeout(timeout: timedelta) -> None:
    public = getattr(dist, "set_timeout", None)  # torch 2.11 has the private name only
    (public or dist.distributed_c10d._set_pg_timeout)(timeout)


def average_gradients(parameters: Iterable[torch.nn.Parameter], num_workers: int) -> None:
    """Replace the gradients by their mean over the workers, as DistributedDataParallel does in the backward pass."""
    for same_dtype in by_dtype([parameter.grad for parameter in parameters if parameter.grad is not None]):
        flat = torch.cat([gradient.flatten() for gradient in same_dtype]).div_(num_workers)
        dist.all_reduce(flat)
        _unflatten(flat, same_dtype)


def broadcast_from_first(tensors: list[torch.Tensor]) -> None:
    """Copy rank 0's values of tensors of one dtype to all workers."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.broadcast(flat, 0)
    _unflatten(flat, tensors)


def by_dtype(tensors: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Group tensors by dtype, so that each group can be concatenated."""
    groups: dict[torch.dtype, list[torch.Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return list(groups.values())


def _unflatten(flat: torch.Tensor, tensors: list[torch.Tensor]) -> None:
    for part, tensor in zip(flat.split([tensor.numel() for tensor in tensors]), tensors, strict=True):
        tensor.copy_(part.view(tensor.shape))
