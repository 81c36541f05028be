"""Learning rate as a function of the step."""

from __future__ import annotations

import math


def learning_rate(step: int, *, base: float, total_steps: int, warmup_steps: int, final_fraction: float) -> float:
    """Linear warm-up to `base`, then half a cosine down to `final_fraction` of it; `step` counts from 0.

    Loshchilov and Hutter, "SGDR", 2017, without restarts.
    """
    if step < warmup_steps:
        return base * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return base * (final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * progress)))
