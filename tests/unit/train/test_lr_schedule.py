"""Learning rate over a run."""

from __future__ import annotations

import pytest

from pillsnap.train.lr_schedule import learning_rate


def test_warm_up_then_half_a_cosine() -> None:
    rates = [learning_rate(step, base=1.0, total_steps=110, warmup_steps=10, final_fraction=0.1) for step in range(110)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert rates[60] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_steps_after_the_end_keep_the_last_rate() -> None:
    assert learning_rate(500, base=2.0, total_steps=100, warmup_steps=0, final_fraction=0.01) == pytest.approx(0.02)
