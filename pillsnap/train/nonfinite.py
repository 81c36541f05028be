"""A step that went wrong changes nothing. That is decided on the device, so that the host never waits for it.

`good` is a tensor () float32, 1 for a step whose gradient is finite and 0 for one whose gradient is not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pillsnap.models.quiet_timm import timm
from pillsnap.train.collectives import by_dtype, copy_from_first

_FIRST_SCALE, _GROW_AFTER = 2.0**16, 2000


class MovingAverage(timm.utils.ModelEmaV3):
    """timm's moving average over weights and buffers, which a bad step leaves as it was."""

    def follow(self, model: nn.Module) -> None:
        """Take weights and buffers from `model`, whose tensors stay the same ones from now on."""
        pairs = list(zip(self.module.state_dict().values(), model.state_dict().values(), strict=True))
        self._averages, self._sources = _columns([pair for pair in pairs if pair[0].is_floating_point()])
        self._counts, self._counted = _columns([pair for pair in pairs if not pair[0].is_floating_point()])

    @torch.no_grad()
    def update_if(self, good: torch.Tensor, step: int) -> None:
        """average += (1 - decay) * (model - average) after a good `step`, counted from 1."""
        # A weight that lies on the device, where foreach_lerp would want one on the host.
        change = torch._foreach_sub(self._sources, self._averages)
        torch._foreach_mul_(change, good * (1 - self.get_decay(step)))
        torch._foreach_add_(self._averages, change)
        if self._counts:
            torch._foreach_copy_(self._counts, self._counted)


class Buffers:
    """A model's running statistics, and what they were before the step."""

    def __init__(self, model: nn.Module) -> None:
        self._live = by_dtype([buffer for buffer in model.buffers() if buffer.numel()])
        # In one piece each, so that choosing between the two is one operation and not one a layer.
        self._kept = [_flat(same) for same in self._live]
        self._seen = [_flat(same) for same in self._live]
        self._kept_parts = [_parts(flat, same) for flat, same in zip(self._kept, self._live, strict=True)]
        self._seen_parts = [_parts(flat, same) for flat, same in zip(self._seen, self._live, strict=True)]

    @torch.no_grad()
    def keep(self) -> None:
        """Remember them as they are now."""
        for kept, live in zip(self._kept_parts, self._live, strict=True):
            torch._foreach_copy_(kept, live)

    @torch.no_grad()
    def put_back(self) -> None:
        """What they were."""
        for kept, live in zip(self._kept_parts, self._live, strict=True):
            torch._foreach_copy_(live, kept)

    @torch.no_grad()
    def put_back_unless(self, good: torch.Tensor) -> None:
        """What they were, after a bad step: they have seen what the weights must not."""
        chosen = good.bool()
        for kept, seen, parts, live in zip(self._kept, self._seen, self._seen_parts, self._live, strict=True):
            torch._foreach_copy_(parts, live)
            torch.where(chosen, seen, kept, out=seen)
            torch._foreach_copy_(live, parts)

    def copy_from_first(self) -> None:
        """Give every worker those of rank 0."""
        for live in self._live:
            copy_from_first(live)


class LossScale:
    """Factor on the loss that keeps float16 gradients in range: halved after an overflow, doubled after 2,000 steps
    without one. The rule of `torch.amp.GradScaler`, whose own step would wait for the device.

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
        """Whether a smaller factor would not help any more; bool ()."""
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
    """One step of a fused `optimizer` with gradients clipped to `max_norm` in all, and none when they are not finite.
    Returns their norm before clipping and `good`.

    `factor` is what the loss was multiplied by. The optimizer divides by it and by the clipping as it reads the
    gradients, which saves passes over them.
    """
    norm = nn.utils.get_total_norm(gradients)
    if factor is not None:
        norm = norm / factor
    good = torch.isfinite(norm).float()
    divisor = ((norm + 1e-6) / max_norm).clamp_(min=1)
    scaled: Any = optimizer
    # What torch.amp.GradScaler gives to an optimizer that can skip a step by itself; its step count stays, too.
    scaled.grad_scale = divisor if factor is None else divisor * factor
    scaled.found_inf = 1 - good
    try:
        optimizer.step()
    finally:
        del scaled.grad_scale, scaled.found_inf
    return norm, good


def _columns(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return [first for first, _ in pairs], [second for _, second in pairs]


def _flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def _parts(flat: torch.Tensor, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    sizes = [tensor.numel() for tensor in tensors]
    return [part.view(tensor.shape) for part, tensor in zip(flat.split(sizes), tensors, strict=True)]
