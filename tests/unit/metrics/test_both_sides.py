"""One answer from both sides of a pill, from a simulated classifier of drugs whose front is blank."""

from __future__ import annotations

import numpy as np
import pytest

from pillsnap.metrics.both_sides import SidePairs, both_sides_metrics


def simulated(num_blank: int, seed: int = 0) -> SidePairs:
    """Calibrated logits of 60 drugs in groups of six alike. Of `num_blank` drugs in each group the front is blank and
    tells the group alone, of the others the back is. The noise is that of a classifier too sure of blank sides.
    """
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(60), 40)
    group = labels[:, None] // 6 == np.arange(60) // 6
    own = labels[:, None] == np.arange(60)
    blank = (labels % 6 < num_blank)[:, None]
    front, back = (
        6 * group + 6 * own * told + rng.normal(0, 1, own.shape) * np.where(told, 1.5, 1.0) for told in (~blank, blank)
    )
    return SidePairs(labels, front, back)


def test_both_sides_name_what_one_alone_cannot() -> None:
    metrics = both_sides_metrics(simulated(num_blank=3))
    assert metrics["num_pairs"] == 2400 and metrics["num_classes"] == 60
    assert 0.4 < metrics["front"]["top1"] < 0.7 and 0.4 < metrics["back"]["top1"] < 0.7
    assert metrics["top1"] > 0.97 and metrics["top5"] > 0.99  # 0.957 if both photos always count alike


def test_a_blank_front_takes_nothing_from_the_back() -> None:
    metrics = both_sides_metrics(simulated(num_blank=6))
    assert metrics["front"]["top1"] == pytest.approx(1 / 6, abs=0.03)
    assert metrics["back"]["top1"] > 0.98
    assert metrics["top1"] > 0.97  # 0.956 if both photos always count alike


def test_calibrated_answers_stay_nearly_calibrated() -> None:
    """Logits that are log probabilities of their own noise, of independent photos."""
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 10, 20_000)
    strength = 1.5
    views = [strength * (strength * np.eye(10)[labels] + rng.normal(size=(len(labels), 10))) for _ in range(2)]
    metrics = both_sides_metrics(SidePairs(labels, *views))
    assert [metrics[name]["ece"] < 0.01 for name in ("front", "back")] == [True, True]
    assert metrics["ece"] < 0.03 and metrics["top1"] > metrics["front"]["top1"] + 0.15
