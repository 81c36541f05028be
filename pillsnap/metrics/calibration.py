"""One number that makes a classifier's confidence mean what it says: the temperature its logits are divided by.

Guo et al., "On Calibration of Modern Neural Networks", 2017: the temperature of the least negative log-likelihood on
validation crops. It changes no answer, only how sure the answer sounds.
"""

from __future__ import annotations

import numpy as np
import torch

TEMPERATURES = tuple(float(value) for value in np.geomspace(0.1, 10.0, 61))
"""What is tried; the best of them is refined between its neighbours."""


def losses_by_temperature(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each row at each of TEMPERATURES: (n, classes) and (n,) -> float32 (n, 61)."""
    logits = logits.float()
    right = logits.gather(1, labels[:, None])
    columns = [torch.logsumexp(logits / t, 1) - right[:, 0] / t for t in TEMPERATURES]
    return torch.stack(columns, 1)


def best_temperature(mean_losses: np.ndarray) -> float:
    """The temperature of least loss, from the mean losses at TEMPERATURES (61,): a parabola through the least three in
    the logarithm of the temperature.
    """
    best = int(np.argmin(mean_losses))
    grid = np.log(TEMPERATURES)
    if best in (0, len(grid) - 1):
        return TEMPERATURES[best]
    left, middle, right = mean_losses[best - 1 : best + 2]
    bend = left - 2 * middle + right
    step = 0.0 if bend <= 0 else 0.5 * (left - right) / bend
    return float(np.exp(grid[best] + step * (grid[1] - grid[0])))
