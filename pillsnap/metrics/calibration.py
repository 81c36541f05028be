"""Calibration of a classifier's confidence: its error, and the temperature that reduces it.

Guo et al., "On Calibration of Modern Neural Networks", 2017. Logits are divided by the temperature of least negative
log-likelihood on the validation crops; this changes the confidence, not the answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

NUM_BINS = 15
TEMPERATURES = tuple(float(value) for value in np.geomspace(0.1, 10.0, 61))
"""Candidates; `best_temperature` interpolates between the neighbours of the best one."""


def calibration_error(confidence: np.ndarray, correct: np.ndarray) -> dict[str, Any]:
    """Expected calibration error `ece` (15 equal-width bins, L1) and the reliability curve by bin.

    Empty bins have None for `confidence` (mean) and `accuracy`.
    """
    bins = np.minimum((np.asarray(confidence) * NUM_BINS).astype(int), NUM_BINS - 1)
    count = np.bincount(bins, minlength=NUM_BINS)
    with np.errstate(invalid="ignore"):
        mean_confidence = np.bincount(bins, weights=confidence, minlength=NUM_BINS) / count
        accuracy = np.bincount(bins, weights=np.asarray(correct, dtype=float), minlength=NUM_BINS) / count
    gaps = np.nan_to_num(np.abs(mean_confidence - accuracy))
    return {
        "ece": float((gaps * count).sum() / count.sum()) if count.sum() else None,
        "count": count.tolist(),
        "confidence": _rounded(mean_confidence),
        "accuracy": _rounded(accuracy),
    }


def losses_by_temperature(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each row at each of TEMPERATURES: (n, classes) and (n,) -> float32 (n, 61)."""
    import torch

    logits = logits.float()
    true = logits.gather(1, labels[:, None])
    columns = [torch.logsumexp(logits / t, 1) - true[:, 0] / t for t in TEMPERATURES]
    return torch.stack(columns, 1)


def best_temperature(mean_losses: np.ndarray) -> float:
    """The temperature of least loss, from the mean losses at TEMPERATURES (61,): the vertex of a parabola through the
    least loss and its neighbours, over the logarithm of the temperature.
    """
    best = int(np.argmin(mean_losses))
    grid = np.log(TEMPERATURES)
    if best in (0, len(grid) - 1):
        return TEMPERATURES[best]
    left, middle, right = mean_losses[best - 1 : best + 2]
    curvature = left - 2 * middle + right
    step = 0.0 if curvature <= 0 else 0.5 * (left - right) / curvature
    return float(np.exp(grid[best] + step * (grid[1] - grid[0])))


def _rounded(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(value) else round(float(value), 4) for value in values]
