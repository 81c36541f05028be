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


@pytest.mark.parametrize("rank", [0, 1])
def test_a_refusal_names_what_is_kept_for_the_evaluation(rank: int) -> None:
    budget = TimeBudget(360.0, spent_s=0.0, share=0.5, num_judged=15_847)
    job = SimpleNamespace(
        budget=budget, events=() if rank == 0 else None, resume=SimpleNamespace(meta={"rates": [0.1, 1.0]}),
        plan=SimpleNamespace(num_val=2_000, val_steps=32), elapsed_s=lambda: 20.0,
        task=SimpleNamespace(name="detection"),
    )  # fmt: skip
    message = str(BudgetClock(cast(Any, job), cast(Any, None)).refuse())
    # 360 s less 2 % and 10 ms a photo, of which detection gets half; 20 s are over.
    kept = " (77 of 360 s, of which 158 s are kept for the evaluation of 15,847 photos)" if rank == 0 else ""
    assert f"longer than the time left for it{kept}. Raise it" in message
