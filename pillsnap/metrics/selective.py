"""Selective classification: the confidence from which answers are given, so that few of them are wrong.

Risk control by testing, "learn then test" (Angelopoulos et al., 2021): for each candidate threshold the hypothesis
"more than `max_wrong` of the answers are wrong" is tested with the exact binomial distribution, which gives Clopper and
Pearson's bound (1934). Candidates are tested from few answers to many; the error rate 1 - CONFIDENCE is shared by
NUM_STARTS of them, and a rejected hypothesis hands its share on to the next (fallback procedure, Wiens and Dmitrienko,
2005). So with a probability of at least CONFIDENCE no threshold with a higher risk is chosen. Photos of one group are
nearly identical: one crop per group, drawn at random, takes part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

CONFIDENCE = 0.95
"""Probability with which the chosen threshold keeps its risk."""
NUM_LEVELS, NUM_STARTS = 60, 2
NEVER = math.inf
"""The threshold that no confidence reaches."""
_CURVE = tuple(share / 20 for share in range(1, 21))


@dataclass(frozen=True)
class Threshold:
    """The least confidence that is answered; NEVER if no threshold keeps the risk."""

    confidence: float
    num_tested: int
    """Answers among the crops that chose it, one per group."""
    upper_bound: float | None
    """Of the share of wrong answers, at the level CONFIDENCE for this threshold alone."""


def choose_threshold(confidence: np.ndarray, wrong: np.ndarray, groups: np.ndarray, max_wrong: float) -> Threshold:
    """The least threshold of which at most `max_wrong` of the answers are wrong, with the probability CONFIDENCE.

    `confidence` (n,), `wrong` (n,) bool and `groups` (n,) of held-out crops.
    """
    one_each = _one_per_group(groups)
    order = one_each[np.argsort(-confidence[one_each], kind="stable")]
    ranked, errors = confidence[order], np.cumsum(wrong[order])
    # All crops of one confidence are answered, or none.
    ends = np.flatnonzero(np.diff(ranked, append=-np.inf)) + 1
    least = fewest_answers(max_wrong, (1 - CONFIDENCE) / NUM_STARTS)
    chosen, allowed = None, 0.0
    if len(order) >= fewest_answers(max_wrong):
        first = min(least, len(order))
        levels = np.unique(ends[np.searchsorted(ends, np.geomspace(first, len(order), NUM_LEVELS))])
        starts = levels[:: math.ceil(len(levels) / NUM_STARTS)]
        for level in levels.tolist():
            allowed += (1 - CONFIDENCE) / len(starts) if level in starts else 0.0
            if binomial_tail(int(errors[level - 1]), level, max_wrong) <= allowed:
                chosen = level
            else:
                allowed = 0.0
    if chosen is None:
        return Threshold(NEVER, 0, None)
    return Threshold(float(ranked[chosen - 1]), chosen, upper_bound(int(errors[chosen - 1]), chosen))


def fewest_answers(max_wrong: float, error_rate: float = 1 - CONFIDENCE) -> int:
    """Answers without an error from which `max_wrong` can be shown: 299 for 1 %."""
    return math.ceil(math.log(error_rate) / math.log1p(-max_wrong))


def binomial_tail(count: int, number: int, probability: float) -> float:
    """Probability of at most `count` successes in `number` trials."""
    i = np.arange(1, count + 1)
    log_choices = np.concatenate([[0.0], np.cumsum(np.log(number - i + 1) - np.log(i))])
    i = np.arange(count + 1)
    return float(np.exp(log_choices + i * math.log(probability) + (number - i) * math.log1p(-probability)).sum())


def upper_bound(count: int, number: int) -> float:
    """Clopper and Pearson's one-sided upper bound of a share at the level CONFIDENCE: `count` of `number` were seen."""
    if count >= number:
        return 1.0
    low, high = count / number, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if binomial_tail(count, number, middle) > 1 - CONFIDENCE else (low, middle)
    return high


def risk_coverage(confidence: np.ndarray, wrong: np.ndarray) -> dict[str, Any]:
    """Share of wrong answers when the most confident share of all crops is answered: a curve of `coverage` and `wrong`,
    and `aurc`, the mean over all coverages (Geifman and El-Yaniv, 2017).
    """
    order = np.argsort(-confidence, kind="stable")
    risk = np.cumsum(wrong[order]) / np.arange(1, len(order) + 1)
    points = [max(1, round(share * len(risk))) for share in _CURVE]
    return {
        "coverage": list(_CURVE),
        "wrong": [round(float(risk[point - 1]), 5) for point in points],
        "aurc": float(risk.mean()),
    }


def auroc(higher: np.ndarray, lower: np.ndarray) -> float:
    """Probability that a value of `higher` exceeds one of `lower`; equal ones count half (Mann and Whitney, 1947)."""
    _, inverse, counts = np.unique(np.concatenate([higher, lower]), return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2
    total = ranks[inverse[: len(higher)]].sum() - len(higher) * (len(higher) + 1) / 2
    return float(total / (len(higher) * len(lower)))


def lower_limit(scores: np.ndarray, share: float) -> float:
    """The limit that a new score falls below with a probability of at most 1 - `share` (split conformal prediction,
    Vovk et al., 2005): an order statistic of the `scores` (n,), or -inf if they are too few.
    """
    rank = math.floor((len(scores) + 1) * (1 - share) + 1e-9)
    return float(np.sort(scores)[rank - 1]) if rank else -math.inf


def _one_per_group(groups: np.ndarray) -> np.ndarray:
    shuffled = np.random.default_rng(0).permutation(len(groups))
    return shuffled[np.unique(groups[shuffled], return_index=True)[1]]
