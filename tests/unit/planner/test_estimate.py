"""Estimates of `pillsnap plan`: measured and reckoned rates, and the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pytest
import torch

from pillsnap.config import load_settings
from pillsnap.data.fill_store import split_stores
from pillsnap.errors import UserError
from pillsnap.models.precision import this_device
from pillsnap.photos.reader import PhotoReader
from pillsnap.planner import estimate as planning
from pillsnap.planner.loader_rates import read_run
from pillsnap.planner.measure import LoaderRates, measure_steps, mock_batch
from pillsnap.planner.report import report_lines
from pillsnap.planner.step_rates import Target
from pillsnap.tasks.registry import make_task
from tests.unit.planner.test_times import task_estimate


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
    total_s = task.seconds + 60
    figures = {
        "device": "RTX 5080", "from_manifest": True, "tasks": [task.to_dict()], "judgement_s": 60.0,
        "total_s": total_s, "fastest_total_s": total_s - 60, "budget_s": 100.0, "fits": False,
        "epochs_within_budget": {"detection": 1}, "alternatives": [], "largest_within_budget": None,
        "assumptions": ["steps: as measured"],
    }  # fmt: skip
    text = "\n".join(report_lines(figures))
    rows = [line.split() for line in report_lines(figures)]
    assert ["minutes", "start", "compile", "training", "waiting", "validation", "total"] in rows
    assert ["detection", "0.5", "0.1", "1.7", "1.7", "0.7", "4.6"] in rows
    assert ["evaluation", "1.0"] in rows and ["all", "5.6"] in rows
    assert "by the faster of the published ratios 4.6 min" in text and "- steps: as measured" in text
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


def planned(monkeypatch: pytest.MonkeyPatch, run: Any = None, **options: Any) -> dict[str, Any]:
    """Stage 3 on an RTX 5080 with the package's steps; a loader of 200 photos per second, 2,000 from the store."""
    monkeypatch.setattr(planning, "measure_task_loader", lambda *_: LoaderRates(200.0, 2000.0))
    monkeypatch.setattr(planning, "sample_run", lambda *_: None)
    settings = load_settings("stage3", {
        "detection.model": "yolo11m", "detection.image_size_px": 640, "detection.batch_size": 16,
        "classification.model": "tf_efficientnetv2_s", "classification.image_size_px": 224,
        "classification.batch_size": 32, "train.compile": "on", "train.device": "cpu",
        **options.pop("set", {}),
    })  # fmt: skip
    return planning.estimate(
        settings, run, seconds=0.1, alternatives=False, say=print, target=Target("RTX 5080"), **options
    )


def test_another_card_is_planned_by_its_roofline_with_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = planned(monkeypatch)
    detection = figures["tasks"][0]
    assert figures["device"] == "RTX 5080"
    assert detection["peak_memory_bytes"] and detection["parts_s"]["compile"] > 60
    assert figures["fastest_total_s"] == figures["total_s"]  # bandwidth limits these steps in either estimate
    assert figures["fits"] is (figures["total_s"] <= 7200)
    texts = "\n".join(figures["assumptions"])
    for part in ("benchmarks/log/", "0.20 times as fast, by bandwidth (960 to 4800 GB/s", "40 % of 113 TFLOPS"):
        assert part in texts
    few = {"detection.samples_per_epoch": 500, "detection.validation_samples": 100, "detection.validate_every": 6}
    fewer = planned(monkeypatch, set=few)["tasks"][0]
    ratio = 500 / (detection["num_train_seen"] / detection["epochs"])
    assert fewer["parts_s"]["training"] == pytest.approx(ratio * detection["parts_s"]["training"])
    assert fewer["num_val_seen"] == 100 * -(-fewer["epochs"] // 6)


def test_a_task_whose_models_cannot_be_measured_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise UserError("There is no detection model.")

    monkeypatch.setattr(planning, "measure_task_loader", lambda *_: LoaderRates(200.0, 2000.0))
    monkeypatch.setattr(planning, "sample_run", lambda *_: None)
    monkeypatch.setattr("pillsnap.planner.step_rates.measure_choice", fails)
    said: list[str] = []
    with pytest.raises(UserError, match="nothing to plan"):
        planning.estimate(load_settings("stage3"), None, seconds=0.1, alternatives=False, say=said.append)
    assert any("cannot be measured: There is no detection model." in line for line in said)


def test_cores_scale_the_loader_and_the_time_budget_is_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning.os, "cpu_count", lambda: 2)
    figures = planned(monkeypatch, cores=8)
    assert figures["tasks"][0]["loader_direct_images_per_s"] == 800
    assert "taken as 4 times as fast on 8" in "\n".join(figures["assumptions"])
    limited = planned(monkeypatch, set={"train.time_budget_minutes": 25})
    assert limited["budget_s"] == 1500
    assert "ends the run within 25 min" in "\n".join(limited["assumptions"])


def test_counts_of_a_manifest_have_combinations_and_what_is_stored(
    toy_manifest: Path, toy_tree: Path, tmp_path: Path
) -> None:
    part = {"detection.validation_samples": 2, "detection.combination_share": 0.5, "detection.samples_per_epoch": 4}
    settings = load_settings("demo", {"classification.image_size_px": 32, "data.store": "jpeg"} | part)
    run = read_run(settings, str(tmp_path / "run"), toy_manifest, str(toy_tree))
    train = run.manifest.filter(pc.equal(run.manifest["split"], "train"))
    combinations = train.filter(pc.equal(train["image_type"], "combination"))
    task = make_task("classification", settings, run.codes)
    samples = task.samples(run.manifest, None)
    store = split_stores(f"{run.where}/store", "classification", task.recipe(samples), "jpeg", run.manifest_hash)
    source = store["train"].source(PhotoReader(str(toy_tree), 10**7))
    numbers = range(len(samples.train) // 2)
    source.prefetch(samples.train, numbers)
    for number in numbers:
        source.fetch(samples.train, number)
    source.flush()
    counts = planning._counts(run)
    assert counts["detection"].train == len(train) and counts["detection"].stored == 0
    assert counts["detection"].train_combinations == len(combinations)
    assert counts["detection"].val == len(run.manifest) - len(train)  # all of it is evaluated at the end
    pills = sum(len(codes) for codes in combinations["codes"].to_pylist())
    assert counts["classification"].train_combinations == pills
    assert counts["classification"].stored == pytest.approx(len(numbers) / len(samples.train))
