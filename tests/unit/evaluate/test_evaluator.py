"""Results of the validation split, of other splits and of other manifests are kept apart."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pillsnap.cli.results import show_result
from pillsnap.config import load_settings
from pillsnap.evaluate import evaluator
from pillsnap.evaluate.evaluator import evaluate_run
from pillsnap.evaluate.predictions import Predictions
from pillsnap.manifest.table import ClassInfo, read_classes, read_manifest, write_manifest
from pillsnap.observe.events import read_events
from pillsnap.runs.directory import Run, load_run, open_run
from pillsnap.runs.enrolled import Enrolled, write_enrolled
from tests.unit.conftest import build_crops


@pytest.fixture
def run(toy_manifest: Path, toy_tree: Path, tmp_path: Path) -> Run:
    """An untrained run; half of its validation photos are in the split test."""
    table = read_manifest(toy_manifest)
    splits = table["split"].to_pylist()
    val = [row for row, split in enumerate(splits) if split == "val"]
    splits = ["test" if row in val[::2] else split for row, split in enumerate(splits)]
    table = table.set_column(table.schema.get_field_index("split"), "split", pa.array(splits))
    path = write_manifest(table, tmp_path / "manifest", read_classes(toy_manifest.parent))
    return open_run(tmp_path / "run", load_settings("demo"), path, toy_tree)[0]


def test_evaluating_another_split_or_manifest_keeps_the_results_of_validation(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate_run(run)
    names = ("metrics.json", "report.html")
    before = [(run.run_dir / name).read_bytes() for name in names]
    metrics = evaluate_run(run, split="test")
    assert [(run.run_dir / name).read_bytes() for name in names] == before
    assert metrics["split"] == "test"
    assert json.loads((run.run_dir / "test" / "metrics.json").read_text()) == metrics
    assert "test split" in (run.run_dir / "test" / "report.html").read_text()
    assert (run.run_dir / "test" / "predictions").is_dir()

    other = write_manifest(run.manifest.slice(1), tmp_path / "other", run.classes)
    of_other = load_run(run.run_dir, manifest_path=other)
    folder = f"manifest-{of_other.manifest_hash[:8]}"
    for split, name in (("val", folder), ("test", f"{folder}/test")):
        assert evaluate_run(of_other, split=split)["folder"] == name
        assert json.loads((run.run_dir / name / "metrics.json").read_text())["split"] == split
    show_result(str(run.run_dir), evaluate_run(of_other))
    assert f"{folder}/report.html" in capsys.readouterr().out.replace("\n", "")
    assert [(run.run_dir / name).read_bytes() for name in names] == before
    assert load_run(run.run_dir, manifest_path=tmp_path / "manifest").results_folder("val") == ""

    (verdict,) = [event for event in read_events(run.run_dir) if event["kind"] == "verdict"]
    assert verdict["metrics_path"] == str(run.run_dir / "metrics.json")


def test_enrolled_drugs_are_measured_beside_the_trained_ones(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four trained drugs; one photo of the second is lost to an enrolled drug, whose own photos are named twice of
    three.
    """
    rows = np.zeros((2, 5), np.float32)
    new = Enrolled.none(5, "ab").with_drug(ClassInfo("K-9", 0), rows, rows[:, 0])
    write_enrolled(run.run_dir, new)
    alone = Predictions(None, build_crops([0, 1, 2, 3], [[0], [1], [2], [2]]), None, {})
    together = Predictions(None, build_crops([0, 1, 2, 3, 4, 4, 4], [[0], [4], [2], [2], [4], [1], [4]]), None, {})

    told: list[tuple[Any, ...]] = []

    def predict(
        *arguments: Any, detect: bool = True, enrolled: Enrolled | None = None, progress: Any, **_: Any
    ) -> Predictions:
        progress(3, 7)
        assert detect is (enrolled is None)
        assert arguments[3] == [*run.codes, *(enrolled.codes if enrolled else [])]
        return together if enrolled else alone

    found = SimpleNamespace(meta={"manifest_hash": run.manifest_hash, "files": {"ema.safetensors": "sha"}})
    monkeypatch.setattr(evaluator, "fit_to_training", lambda *_: None)
    monkeypatch.setattr(evaluator, "best_checkpoints", lambda *_: ({"classification": found}, []))
    monkeypatch.setattr(evaluator, "predict_manifest", predict)
    monkeypatch.setattr(evaluator, "exported_problems", lambda _: [])
    metrics = evaluate_run(run, progress=lambda *step: told.append(step))
    assert told == [("val photos", 3, 7), ("val photos, with enrolled drugs", 3, 7)]
    seen = [(each["phase"], each["done"]) for each in read_events(run.run_dir) if each["kind"] == "evaluation"]
    assert seen == [("val photos", 3)]  # monitors are told every few seconds
    assert metrics["classification"]["top1"] == 0.75 and metrics["classification"]["num_classes"] == 4
    measured = metrics["enrolled"]
    assert measured["num_codes"] == 1
    assert (measured["trained"]["top1"], measured["trained"]["alone"]) == (0.5, 0.75)
    assert (measured["enrolled"]["top1"], measured["enrolled"]["num_samples"]) == (2 / 3, 3)
    show_result(str(run.run_dir), metrics)
    assert "1 enrolled drugs: top-1 of the trained drugs 50.00 %, 75.00 % without" in capsys.readouterr().out
    text = " ".join((run.run_dir / "report.html").read_text(encoding="utf-8").split())
    assert "With 1 enrolled drugs" in text
    write_enrolled(run.run_dir, new.without("K-9"))
    assert "enrolled" not in evaluate_run(run)


def test_only_the_validation_photos_of_the_run_chose_its_models(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(meta={"manifest_hash": run.manifest_hash, "files": {"ema.safetensors": "sha"}})
    fitted: list[bool] = []

    def predict(*_: Any, fitted_here: bool, **__: Any) -> Predictions:
        fitted.append(fitted_here)
        return Predictions(None, None, None, {}, fitted_here=fitted_here)

    monkeypatch.setattr(evaluator, "best_checkpoints", lambda *_: ({"classification": found}, []))
    monkeypatch.setattr(evaluator, "predict_manifest", predict)
    monkeypatch.setattr(evaluator, "fit_to_training", lambda *_: None)
    monkeypatch.setattr(evaluator, "exported_problems", lambda _: [])
    chose = [evaluate_run(run, split=split)["split_facts"]["chose_models"] for split in ("val", "test")]
    found.meta["manifest_hash"] = "another"
    chose.append(evaluate_run(run)["split_facts"]["chose_models"])
    assert fitted == chose == [True, False, False]
