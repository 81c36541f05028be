"""Skips non-finite steps on the device, without a host sync: weights, optimizer, average and buffers stay unchanged.

`good` is a tensor () float32: 1 for a step with a finite gradient, else 0. clipped_step skips the update of weights and
optimizer, Buffers restores running statistics, MovingAverage skips its update.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pillsnap.models.quiet_timm import timm
from pillsnap.train.step.batch_statistics import STATISTICS
from pillsnap.train.step.collectives import broadcast_from_first, by_dtype

_FIRST_SCALE, _GROW_AFTER = 2.0**16, 2000


class MovingAverage(timm.utils.ModelEmaV3):
    """timm's moving average of weights and buffers without running statistics, updated only after good steps."""

    def follow(self, model: nn.Module) -> None:
        """Average the weights and buffers of `model`, which must keep its tensor objects. Running statistics are left
        to BatchStatistics.
        """
        averages = {name: value for name, value in self.module.state_dict().items() if not name.endswith(STATISTICS)}
        sources = model.state_dict()
        pairs = [(average, sources[name]) for name, average in averages.items()]
        self._averages, self._sources = _unzip([pair for pair in pairs if pair[0].is_floating_point()])
        self._counts, self._counted = _unzip([pair for pair in pairs if not pair[0].is_floating_point()])

    @torch.no_grad()
    def update_if(self, good: torch.Tensor, step: int) -> None:
        """average += (1 - decay) * (model - average) after a good `step`, counted from 1."""
        # foreach_lerp needs its weight on the host; this one is on the device.
        change = torch._foreach_sub(self._sources, self._averages)
        torch._foreach_mul_(change, good * (1 - self.get_decay(step)))
        torch._foreach_add_(self._averages, change)
        if self._counts:
            torch._foreach_copy_(self._counts, self._counted)


class Buffers:
    """A model's buffers (running statistics), and a copy from before the step."""

    def __init__(self, model: nn.Module) -> None:
        self._live = by_dtype([buffer for buffer in model.buffers() if buffer.numel()])
        # Flat, so that choosing between the two is one operation per dtype instead of one per layer.
        self._kept = [_flat(same) for same in self._live]
        self._after = [_flat(same) for same in self._live]
        self._kept_parts = [_parts(flat, same) for flat, same in zip(self._kept, self._live, strict=True)]
        self._after_parts = [_parts(flat, same) for flat, same in zip(self._after, self._live, strict=True)]

    @torch.no_grad()
    def keep(self) -> None:
        """Copy the current values."""
        for kept, live in zip(self._kept_parts, self._live, strict=True):
            torch._foreach_copy_(kept, live)

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the copy."""
        for kept, live in zip(self._kept_parts, self._live, strict=True):
            torch._foreach_copy_(live, kept)

    @torch.no_grad()
    def restore_unless(self, good: torch.Tensor) -> None:
        """Restore the copy after a bad step: its forward pass has changed the running statistics."""
        is_good = good.bool()
        for kept, after, parts, live in zip(self._kept, self._after, self._after_parts, self._live, strict=True):
            torch._foreach_copy_(parts, live)
            torch.where(is_good, after, kept, out=after)
            torch._foreach_copy_(live, parts)

    def broadcast_from_first(self) -> None:
        """Copy rank 0's values to all workers."""
        for live in self._live:
            broadcast_from_first(live)


class LossScale:
    """Factor on the loss that keeps float16 gradients in range: halved after an overflow, doubled after 2,000 steps
    without one. The rule of `torch.amp.GradScaler`, without its host sync.

    Micikevicius et al., "Mixed Precision Training", 2018.
    """

    def __init__(self, device: torch.device) -> None:
        self.factor = torch.full((), _FIRST_SCALE, device=device)
        self._good_steps = torch.zeros((), dtype=torch.int32, device=device)

    @torch.no_grad()
    def update(self, good: torch.Tensor) -> None:
        """Count one step."""
        steps = (self._good_steps + 1) * good.to(torch.int32)
        grown = steps >= _GROW_AFTER
        self._good_steps.copy_(steps.masked_fill_(grown, 0))
        self.factor.copy_(torch.where(good.bool(), self.factor * (1 + grown.float()), self.factor / 2))

    @property
    def exhausted(self) -> torch.Tensor:
        """Whether the factor is too small to be halved again; bool ()."""
        return self.factor <= 1

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"factor": self.factor, "good_steps": self._good_steps}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.factor.copy_(state["factor"])
        self._good_steps.copy_(state["good_steps"])


@torch.no_grad()
def clipped_step(
    optimizer: torch.optim.Optimizer,
    gradients: list[torch.Tensor],
    max_norm: float,
    factor: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One step of a fused `optimizer`, its gradients clipped to a total norm of `max_norm`; none when they are not
    finite. Returns the norm before clipping, and `good`.

    `factor` is the loss scale. The fused kernel divides by it and by the clipping factor while it reads the gradients.
    """
    norm = nn.utils.get_total_norm(gradients)
    if factor is not None:
        norm = norm / factor
    good = torch.isfinite(norm).float()
    divisor = ((norm + 1e-6) / max_norm).clamp_(min=1)
    scaled: Any = optimizer
    # The attributes that torch.amp.GradScaler sets: a fused optimizer then skips the step and its step count.
    scaled.grad_scale = divisor if factor is None else divisor * factor
    scaled.found_inf = 1 - good
    try:
        optimizer.step()
    finally:
        del scaled.grad_scale, scaled.found_inf
    return norm, good


def _unzip(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return [first for first, _ in pairs], [second for _, second in pairs]


def _flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def _parts(flat: torch.Tensor, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    sizes = [tensor.numel() for tensor in tensors]
    return [part.view(tensor.shape) for part, tensor in zip(flat.split(sizes), tensors, strict=True)]
