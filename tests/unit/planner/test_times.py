"""From rates to times: passes over the data, parts of a task, epochs and models that fit a budget."""

from __future__ import annotations

import pytest

from pillsnap.config import load_settings
from pillsnap.planner.estimate import expected_counts
from pillsnap.planner.measure import LoaderRates, StepRates
from pillsnap.planner.times import (
    START_S,
    Counts,
    Passes,
    TaskEstimate,
    epochs_within,
    evaluation_s,
    largest_within,
    total_s,
)


def task_estimate(
    task: str = "detection", train: float = 100.0, loader: float = 50.0, epochs: int = 10, stored: float | None = None
) -> TaskEstimate:
    """1,000 samples to train, 200 to validate; without a store unless `stored`, its rate, is given."""
    passes = Passes(1000.0 * epochs, 1000.0, 200.0 * epochs, 200.0, epochs)
    rates = StepRates(train, 2 * train, None, 5.0)
    return TaskEstimate(
        task, "model", 64, Counts(1000, 200), passes, rates, LoaderRates(loader, loader if stored is None else stored)
    )


def test_a_sample_takes_the_slower_of_model_and_loader() -> None:
    waiting, working = task_estimate(loader=50), task_estimate(loader=400)
    assert (waiting.limit, working.limit) == ("loader", "model")
    expected = {"start": START_S, "compile": 5, "training": 100, "waiting": 100, "validation": 40}
    assert waiting.parts_s == pytest.approx(expected)
    assert working.parts_s == pytest.approx(expected | {"waiting": 0, "validation": 10})
    assert working.seconds == pytest.approx(START_S + 5 + 110)


def test_only_the_first_pass_reads_photos_where_there_is_a_store() -> None:
    filling = task_estimate(loader=50, stored=400)
    assert filling.parts_s["waiting"] == pytest.approx(1000 / 50 - 1000 / 100)
    assert filling.parts_s["validation"] == pytest.approx(200 / 50 + 9 * 200 / 200)
    assert filling.loader_images_per_s == pytest.approx(10_000 / (1000 / 50 + 9000 / 400))


def test_passes_follow_the_sizes_of_epochs_and_validations() -> None:
    counts = Counts(1000, 200, train_combinations=50)
    chosen = {"epochs": 7, "samples_per_epoch": 100, "validation_samples": 40, "validate_every": 3}
    detection = load_settings("demo").detection.model_copy(update=chosen)
    # Validated after epochs 3, 6 and 7, the last.
    assert Passes.of(detection, counts) == Passes(700, 700, 120, 40, 7)
    # 350 combination photos are 50 seen seven times; of the single ones, 350 are seen.
    mixed = detection.model_copy(update={"combination_share": 0.5})
    assert Passes.of(mixed, counts) == Passes(700, 400, 120, 40, 7)
    whole = detection.model_copy(update={"samples_per_epoch": None, "validation_samples": None, "validate_every": 1})
    assert Passes.of(whole, counts) == Passes(7000, 1000, 1400, 200, 7)
    half_stored = Counts(1000, 200, stored=0.5)
    assert Passes.of(whole, half_stored) == Passes(7000, 500, 1400, 100, 7)
    assert Passes.of(load_settings("demo").classification.model_copy(update=chosen), counts).train == 700


def test_epochs_are_scaled_to_the_budget() -> None:
    tasks = [task_estimate(epochs=10, loader=400), task_estimate("classification", epochs=20, loader=400)]
    assert epochs_within(tasks, total_s(tasks)) == {"detection": 10, "classification": 20}
    half = evaluation_s(tasks) + 2 * (START_S + 5) + 0.5 * 30 * 11
    assert epochs_within(tasks, half) == {"detection": 5, "classification": 10}
    assert epochs_within(tasks, 10.0) == {"detection": 0, "classification": 0}


def test_largest_models_within_the_budget_classification_first() -> None:
    rates = (400.0, 200.0, 100.0)
    choices = {name: [task_estimate(name, rate, 1e9) for rate in rates] for name in ("detection", "classification")}

    def taken(budget_s: float) -> list[float] | None:
        found = largest_within(choices, budget_s, lambda tasks: sum(task.seconds for task in tasks))
        return None if found is None else [task.steps.train_images_per_s for task in found]

    seconds = {rate: task.seconds for rate, task in zip(rates, choices["detection"], strict=True)}
    assert taken(1e9) == [100, 100]
    assert taken(seconds[200] + seconds[100]) == [200, 100]
    assert taken(seconds[400] * 2) == [400, 400]
    assert taken(seconds[400]) is None


def test_expected_counts_of_stage_3() -> None:
    counts = expected_counts(load_settings("stage3"))
    assert counts["detection"] == Counts(81_500, 18_500, 4_075)
    assert counts["classification"] == Counts(89_650, 20_350, 12_225)


def test_evaluation_time_is_of_both_models_or_the_loader() -> None:
    fast, slow = task_estimate(loader=1e9), task_estimate(loader=10)
    assert evaluation_s([fast, fast]) == pytest.approx(START_S + 200 * 2 / 200)
    assert evaluation_s([slow]) == pytest.approx(START_S + 200 / 10)
    # Likeness is fitted to all of 1,000 training crops.
    assert evaluation_s([task_estimate("classification", loader=10)]) == pytest.approx(START_S + 1200 / 10)
