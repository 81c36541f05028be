from __future__ import annotations

import pytest
import torch

from pillsnap.config import load_settings
from pillsnap.planner.estimate import (
    START_S,
    Counts,
    TaskPlan,
    best_within,
    epochs_within,
    evaluation_s,
    expected_counts,
)
from pillsnap.planner.measure import StepRates, measure_steps, mock_batch
from pillsnap.planner.report import plan_lines
from pillsnap.tasks.registry import make_task


def task_plan(task: str = "detection", train: float = 100.0, loader: float = 50.0, epochs: int = 10) -> TaskPlan:
    return TaskPlan(task, "model", 64, epochs, Counts(1000, 200), StepRates(train, 2 * train, None, 5.0), loader)


def test_an_epoch_goes_as_fast_as_the_slower_of_model_and_loader() -> None:
    waiting, working = task_plan(loader=50), task_plan(loader=400)
    assert (waiting.limit, working.limit) == ("loader", "model")
    assert waiting.epoch_s == pytest.approx(1000 / 50 + 200 / 50)
    assert working.epoch_s == pytest.approx(1000 / 100 + 200 / 200)
    assert working.seconds == pytest.approx(START_S + 5 + 10 * 11)


def test_epochs_fill_the_budget() -> None:
    plans = [task_plan(epochs=10, loader=400), task_plan("classification", epochs=20, loader=400)]
    fixed_s = 40.0
    exact = fixed_s + sum(plan.seconds for plan in plans)
    assert epochs_within(plans, exact, fixed_s) == {"detection": 10, "classification": 20}
    half = fixed_s + 2 * (START_S + 5) + 0.5 * 30 * 11
    assert epochs_within(plans, half, fixed_s) == {"detection": 5, "classification": 10}
    assert epochs_within(plans, 10.0, fixed_s) == {"detection": 0, "classification": 0}


def test_the_largest_choice_within_the_budget_is_taken_classification_first() -> None:
    rates = (400.0, 200.0, 100.0)
    choices = {name: [task_plan(name, rate, 1e9) for rate in rates] for name in ("detection", "classification")}

    def taken(budget_s: float) -> list[float] | None:
        found = best_within(choices, budget_s, lambda _: 0.0)
        return None if found is None else [plan.steps.train_images_per_s for plan in found]

    seconds = {rate: plan.seconds for rate, plan in zip(rates, choices["detection"], strict=True)}
    assert taken(1e9) == [100, 100]
    assert taken(seconds[200] + seconds[100]) == [200, 100]
    assert taken(seconds[400] * 2) == [400, 400]
    assert taken(seconds[400]) is None


def test_counts_of_stage_3_before_there_is_a_manifest() -> None:
    counts = expected_counts(load_settings("stage3"))
    assert counts["detection"] == Counts(81_500, 18_500)
    assert counts["classification"] == Counts(89_650, 20_350)


def test_the_judgement_costs_both_models_or_the_loader() -> None:
    fast, slow = task_plan(loader=1e9), task_plan(loader=10)
    assert evaluation_s(fast, fast, 1000) == pytest.approx(START_S + 1000 * 2 / 200)
    assert evaluation_s(slow, None, 1000) == pytest.approx(START_S + 1000 / 10)


@pytest.mark.parametrize("name", ["detection", "classification"])
def test_steps_of_both_tasks_are_measured(name: str) -> None:
    settings = load_settings("demo", {"detection.image_size_px": 64, "classification.image_size_px": 32})
    task = make_task(name, settings, ["K-1", "K-2"])
    device = torch.device("cpu")
    batch = mock_batch(task, 2, device, num_classes=2)
    assert batch.images.shape == (2, task.settings.image_size_px, task.settings.image_size_px, 3)
    rates = measure_steps(task, settings.train, device, batch_size=2, seconds=0.01, num_classes=2)
    assert rates.val_images_per_s > rates.train_images_per_s > 0
    assert rates.peak_memory_bytes is None


def test_the_plan_as_text_says_what_limits_and_what_fits() -> None:
    plan = task_plan(loader=50)
    figures = {
        "device": "CPU", "from_manifest": True, "tasks": [plan.as_row()], "judgement_s": 60.0,
        "total_s": plan.seconds + 60, "budget_s": 100.0, "fits": False, "epochs_within_budget": {"detection": 1},
        "alternatives": [], "largest_within_budget": None,
    }  # fmt: skip
    text = "\n".join(plan_lines(figures))
    assert "detection waits for the loader: it makes 50% of what the model takes" in text
    assert "budget 2 min: it does not fit" in text
    assert "holds 1 epochs of detection" in text
    assert "none of the measured models fits" in text
