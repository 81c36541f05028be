"""Calibration of a classifier's confidence: its error, and the temperature that reduces it.

Guo et al., "On Calibration of Modern Neural Networks", 2017. Logits are divided by the temperature of least negative
log-likelihood on the validation crops; this changes the confidence, not the answer. As in Platt, "Probabilistic Outputs
for Support Vector Machines", 1999, the targets of n crops are not 0 and 1: each label has the probability
1 - 1 / (n + 2), the other classes share the rest. Otherwise n crops without an error would make every answer certain.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

NUM_BINS = 15
TEMPERATURES = tuple(float(value) for value in np.geomspace(0.1, 10.0, 61))
"""Candidates, and the limits; `best_temperature` interpolates between the neighbours of the best one."""
NUM_FACTS = len(TEMPERATURES) + 2
NUM_FOLDS = 5


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


def temperature_facts(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What fitting a temperature needs of each row: (n, classes) and (n,) -> float32 (n, NUM_FACTS).

    The negative log-likelihood at each of TEMPERATURES; the label's logit minus the mean of the others; the highest
    logit minus the label's.
    """
    import torch

    logits = logits.float()
    true = logits.gather(1, labels[:, None])
    losses = [torch.logsumexp(logits / t, 1, keepdim=True) - true / t for t in TEMPERATURES]
    others = (logits.sum(1, keepdim=True) - true) / max(logits.shape[1] - 1, 1)
    return torch.cat([*losses, true - others, logits.amax(1, keepdim=True) - true], 1)


def best_temperature(facts: np.ndarray) -> float:
    """The temperature of least loss, from the `temperature_facts` (n, NUM_FACTS) of n crops: the vertex of a parabola
    through the least loss and its neighbours, over the logarithm of the temperature. Rows that are not finite do not
    count; 1 without any other.
    """
    facts = facts[np.isfinite(facts).all(1)]
    if not len(facts):
        return 1.0
    mean = facts.mean(0, dtype=np.float64)
    # The loss with smoothed targets is the label's plus this share of the distance to the other logits.
    losses = mean[:-2] + mean[-2] / np.array(TEMPERATURES) / (len(facts) + 2)
    best = int(np.argmin(losses))
    grid = np.log(TEMPERATURES)
    if best in (0, len(grid) - 1):
        return TEMPERATURES[best]
    left, middle, right = losses[best - 1 : best + 2]
    curvature = left - 2 * middle + right
    step = 0.0 if curvature <= 0 else 0.5 * (left - right) / curvature
    return float(np.exp(grid[best] + step * (grid[1] - grid[0])))


def cross_fitted_confidence(facts: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Confidence (n,) in the best class of each crop, at the temperature fitted to the crops of other groups.

    `facts` (n, NUM_FACTS) are those of `temperature_facts`; crops of one of the `groups` (n,) are in the same of
    NUM_FOLDS folds. 0 for a row that is not finite.
    """
    folds = folds_of(groups)
    confidence = np.zeros(len(facts))
    for fold in np.unique(folds):
        inside = folds == fold
        confidence[inside] = _confidence(facts[inside], best_temperature(facts[~inside]))
    return confidence


def folds_of(groups: np.ndarray) -> np.ndarray:
    """Fold (n,) of each crop, 0 to NUM_FOLDS - 1; crops of one of the `groups` (n,) are in the same."""
    return np.unique(groups, return_inverse=True)[1] % NUM_FOLDS


def _confidence(facts: np.ndarray, temperature: float) -> np.ndarray:
    """Confidence (n,) in the best class; the loss is interpolated between the neighbouring TEMPERATURES."""
    grid = np.log(TEMPERATURES)
    above = int(np.clip(np.searchsorted(grid, np.log(temperature)), 1, len(grid) - 1))
    share = (np.log(temperature) - grid[above - 1]) / (grid[above] - grid[above - 1])
    losses = (1 - share) * facts[:, above - 1] + share * facts[:, above]
    return np.nan_to_num(np.exp(np.minimum(facts[:, -1] / temperature - losses, 0.0)), nan=0.0)


def _rounded(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(value) else round(float(value), 4) for value in values]
