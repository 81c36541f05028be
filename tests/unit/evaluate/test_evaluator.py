"""Results of the validation split and of other splits are kept apart."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from pillsnap.config import load_settings
from pillsnap.evaluate import evaluator
from pillsnap.evaluate.evaluator import evaluate_run
from pillsnap.evaluate.inference import Predictions
from pillsnap.manifest.table import read_classes, read_manifest, write_manifest
from pillsnap.observe.events import read_events
from pillsnap.runs.directory import Run, open_run


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


def test_evaluating_another_split_keeps_the_results_of_validation(run: Run) -> None:
    evaluate_run(run)
    names = ("metrics.json", "report.html")
    before = [(run.run_dir / name).read_bytes() for name in names]
    metrics = evaluate_run(run, split="test")
    assert [(run.run_dir / name).read_bytes() for name in names] == before
    assert metrics["split"] == "test"
    assert json.loads((run.run_dir / "test" / "metrics.json").read_text()) == metrics
    assert "test split" in (run.run_dir / "test" / "report.html").read_text()
    assert (run.run_dir / "test" / "predictions").is_dir()
    (verdict,) = [event for event in read_events(run.run_dir) if event["kind"] == "verdict"]
    assert verdict["metrics_path"] == str(run.run_dir / "metrics.json")


def test_only_the_validation_photos_of_the_run_chose_its_models(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(meta={"manifest_hash": run.manifest_hash, "files": {"ema.safetensors": "sha"}})
    fitted: list[bool] = []

    def predict(*_: Any, fitted_here: bool, limits: None) -> Predictions:
        fitted.append(fitted_here)
        return Predictions(None, None, None, {}, fitted_here=fitted_here)

    monkeypatch.setattr(evaluator, "find_run_checkpoint", lambda *_: (found, []))
    monkeypatch.setattr(evaluator, "predict_manifest", predict)
    monkeypatch.setattr(evaluator, "fit_to_training", lambda *_: None)
    monkeypatch.setattr(evaluator, "model_problems", lambda _: [])
    chose = [evaluate_run(run, split=split)["split_facts"]["chose_models"] for split in ("val", "test")]
    found.meta["manifest_hash"] = "another"
    chose.append(evaluate_run(run)["split_facts"]["chose_models"])
    assert fitted == chose == [True, False, False]
