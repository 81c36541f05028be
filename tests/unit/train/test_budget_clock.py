"""What of a time budget is left for training."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from pillsnap.train.budget_clock import BudgetClock
from pillsnap.train.schedule.time_budget import TimeBudget


@pytest.mark.parametrize(("validation_s", "judging_s"), [(1.0, 285.0), (100.0, 2 * 28_500 * 100 / 4_000)])
def test_time_for_the_evaluation_is_kept(validation_s: float, judging_s: float) -> None:
    # 28,500 photos are judged and 4,000 validated. On a fast GPU the evaluation takes longer than the validation tells:
    # at 180 photos/s, seen on an H200, 158 s, where twice the validation's time would be 14 s.
    budget = TimeBudget(7200.0, spent_s=200.0, share=1.0, num_judged=28_500)
    resume = SimpleNamespace(meta={"rates": [0.1, validation_s]})
    plan = SimpleNamespace(num_val=4_000, val_steps=32)
    clock = BudgetClock(cast(Any, SimpleNamespace(budget=budget, events=(), resume=resume, plan=plan)), cast(Any, None))
    assert clock.allowed_s == pytest.approx(7200 - 200 - 0.02 * 7200 - judging_s)
