"""Estimates of `pillsnap plan`: times, budgets, measured rates and the report."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pillsnap.config import load_settings
from pillsnap.data.fill_store import split_stores
from pillsnap.models.precision import this_device
from pillsnap.photos.reader import PhotoReader
from pillsnap.planner.estimate import (
    START_S,
    Counts,
    TaskEstimate,
    epochs_within,
    evaluation_s,
    expected_counts,
    largest_within,
    read_run,
)
from pillsnap.planner.measure import StepRates, measure_steps, mock_batch
from pillsnap.planner.report import report_lines
from pillsnap.tasks.registry import make_task


def task_estimate(
    task: str = "detection", train: float = 100.0, loader: float = 50.0, epochs: int = 10
) -> TaskEstimate:
    return TaskEstimate(task, "model", 64, epochs, Counts(1000, 200), StepRates(train, 2 * train, None, 5.0), loader)


def test_epoch_time_follows_the_slower_of_model_and_loader() -> None:
    waiting, working = task_estimate(loader=50), task_estimate(loader=400)
    assert (waiting.limit, working.limit) == ("loader", "model")
    assert waiting.epoch_s == pytest.approx(1000 / 50 + 200 / 50)
    assert working.epoch_s == pytest.approx(1000 / 100 + 200 / 200)
    assert working.seconds == pytest.approx(START_S + 5 + 10 * 11)


def test_epochs_are_scaled_to_the_budget() -> None:
    tasks = [task_estimate(epochs=10, loader=400), task_estimate("classification", epochs=20, loader=400)]
    fixed_s = 40.0
    exact = fixed_s + sum(task.seconds for task in tasks)
    assert epochs_within(tasks, exact, fixed_s) == {"detection": 10, "classification": 20}
    half = fixed_s + 2 * (START_S + 5) + 0.5 * 30 * 11
    assert epochs_within(tasks, half, fixed_s) == {"detection": 5, "classification": 10}
    assert epochs_within(tasks, 10.0, fixed_s) == {"detection": 0, "classification": 0}


def test_largest_models_within_the_budget_classification_first() -> None:
    rates = (400.0, 200.0, 100.0)
    choices = {name: [task_estimate(name, rate, 1e9) for rate in rates] for name in ("detection", "classification")}

    def taken(budget_s: float) -> list[float] | None:
        found = largest_within(choices, budget_s, lambda _: 0.0)
        return None if found is None else [task.steps.train_images_per_s for task in found]

    seconds = {rate: task.seconds for rate, task in zip(rates, choices["detection"], strict=True)}
    assert taken(1e9) == [100, 100]
    assert taken(seconds[200] + seconds[100]) == [200, 100]
    assert taken(seconds[400] * 2) == [400, 400]
    assert taken(seconds[400]) is None


def test_expected_counts_of_stage_3() -> None:
    counts = expected_counts(load_settings("stage3"))
    assert counts["detection"] == Counts(81_500, 18_500)
    assert counts["classification"] == Counts(89_650, 20_350)


def test_evaluation_time_is_of_both_models_or_the_loader() -> None:
    fast, slow = task_estimate(loader=1e9), task_estimate(loader=10)
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


def test_report_names_the_limit_and_what_fits() -> None:
    task = task_estimate(loader=50)
    figures = {
        "device": "CPU", "from_manifest": True, "tasks": [task.to_dict()], "judgement_s": 60.0,
        "total_s": task.seconds + 60, "budget_s": 100.0, "fits": False, "epochs_within_budget": {"detection": 1},
        "alternatives": [], "largest_within_budget": None,
    }  # fmt: skip
    text = "\n".join(report_lines(figures))
    assert "detection is limited by the loader, which reaches 50% of the model's rate" in text
    assert "budget 2 min: it does not fit" in text
    assert "allows 1 epochs of detection" in text
    assert "none of the measured models fits" in text


def test_device_setting_is_honoured_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert this_device("cpu") == torch.device("cpu")
    assert this_device("auto") == this_device("gpu") == torch.device("cuda", 0)


def test_plan_reads_the_store_of_the_run_and_writes_nothing(toy_manifest: Path, toy_tree: Path, tmp_path: Path) -> None:
    """Its name has the manifest's hash; missing windows are cut and not kept."""
    settings = load_settings("demo", {"classification.image_size_px": 32, "data.store": "jpeg"})
    before = sorted(toy_tree.rglob("*"))
    run = read_run(settings, str(tmp_path / "run"), toy_manifest, str(toy_tree))
    assert len(run.manifest_hash) == 64 and run.where == str(tmp_path / "run")
    task = make_task("classification", settings, run.codes)
    samples = task.samples(run.manifest, None)
    stores = split_stores(
        f"{run.where}/store", "classification", task.recipe(samples), "jpeg", run.manifest_hash, read_only=True
    )
    source = stores["train"].source(PhotoReader(str(toy_tree), 10**7))
    source.prefetch(samples.train, [0, 1])
    source.fetch(samples.train, 0)
    assert len(source.fresh) == 1 and source.fresh[0][1].data
    source.flush()
    assert not (tmp_path / "run").exists() and sorted(toy_tree.rglob("*")) == before
