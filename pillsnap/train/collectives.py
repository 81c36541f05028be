"""What the workers of one run tell each other; with one worker, nothing leaves the process."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist

from pillsnap.train.device_readback import Readings, lag_steps


class Peers:
    """Sums, gathers and agreements over all workers. Every worker must make the same calls in the same order."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        started = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if started else 0
        self.count = dist.get_world_size() if started else 1
        self.lag_steps = lag_steps(device) if self.count > 1 else 0
        """Steps after which the answer of `sum_later` is there without waiting."""

    def sum(self, values: torch.Tensor) -> list[float]:
        """Element-wise sum over the workers, on the host."""
        return self.sum_on_device(values).tolist()

    def sum_on_device(self, values: torch.Tensor) -> torch.Tensor:
        """Element-wise sum over the workers, which the host does not wait for; in double precision with several."""
        if self.count == 1:
            return values
        total = values.to(self._device, torch.float64, copy=True)
        dist.all_reduce(total)
        return total

    def sum_later(self, values: torch.Tensor) -> Callable[[], list[float]]:
        """Begin a sum of `values` on the host; what is returned waits for it."""
        if self.count == 1 or self._device.type != "cuda":
            return lambda: self.sum(values)
        total = values.pin_memory().to(self._device, torch.float64, non_blocking=True)
        dist.all_reduce(total)
        readings: Readings[None] = Readings(self._device)
        readings.send(total, None)
        return lambda: next(readings.all())[1]

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


def average_gradients(parameters: Iterable[torch.nn.Parameter], num_workers: int) -> None:
    """What DistributedDataParallel does during a backward pass, after it: the workers' mean gradient on all of them."""
    for same in by_dtype([parameter.grad for parameter in parameters if parameter.grad is not None]):
        flat = torch.cat([gradient.flatten() for gradient in same]).div_(num_workers)
        dist.all_reduce(flat)
        _scatter(flat, same)


def copy_from_first(tensors: list[torch.Tensor]) -> None:
    """Give every worker rank 0's values of tensors of one dtype."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.broadcast(flat, 0)
    _scatter(flat, tensors)


def by_dtype(tensors: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """The tensors in groups that can travel, or be copied, in one piece."""
    groups: dict[torch.dtype, list[torch.Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return list(groups.values())


def _scatter(flat: torch.Tensor, tensors: list[torch.Tensor]) -> None:
    for part, tensor in zip(flat.split([tensor.numel() for tensor in tensors]), tensors, strict=True):
        tensor.copy_(part.view(tensor.shape))
