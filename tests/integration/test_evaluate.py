"""One run from manifest to report, and `pillsnap evaluate` and `pillsnap verify` on it: missed targets, a missing and a
damaged checkpoint.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from pillsnap.cli import main, results, terminal
from pillsnap.errors import UserError
from pillsnap.manifest.table import read_manifest
from pillsnap.observe.events import read_events
from pillsnap.runs.directory import Run, open_run
from pillsnap.train.driver import train_and_evaluate
from tests.integration.test_train import tiny

TARGETS = {"targets__top1": 1.0, "targets__map50": 1.0, "targets__total_time_s": 3600.0}


@pytest.fixture(scope="module")
def trained(
    ray_local: None, toy_manifest: Path, toy_tree: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Run, dict[str, Any]]:
    """A run of both tasks, and the metrics with which it ended."""
    run, notes = open_run(tmp_path_factory.mktemp("evaluated") / "toy", tiny(**TARGETS), toy_manifest, toy_tree)
    assert notes == []
    return run, train_and_evaluate(run, Console(quiet=True))


@pytest.fixture
def run_dir(trained: tuple[Run, dict[str, Any]], tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(trained[0].run_dir, tmp_path / "toy"))


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> tuple[int, list[str]]:
    """Exit code and non-empty lines of the command."""
    for module in (results, terminal):
        monkeypatch.setattr(module, "console", Console(width=80))
    result = CliRunner().invoke(main.app, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, [line.strip() for line in result.output.splitlines() if line.strip()]


def test_run_from_manifest_to_metrics_and_report(
    trained: tuple[Run, dict[str, Any]], toy_manifest: Path, toy_tree: Path
) -> None:
    run, metrics = trained
    manifest = read_manifest(toy_manifest)
    num_val = manifest["split"].to_pylist().count("val")
    assert metrics["schema_version"] == 1
    assert metrics["detection"]["num_photos"] == num_val
    assert metrics["classification"]["num_samples"] == metrics["detection"]["num_boxes"]
    assert 0.0 <= metrics["classification"]["top1"] <= metrics["classification"]["top5"] <= 1.0
    assert json.loads((run.run_dir / "metrics.json").read_text())["targets"] == metrics["targets"]
    assert (run.run_dir / "report.html").stat().st_size > 10_000
    for name in ("detections", "classification", "pipeline"):
        assert (run.run_dir / "predictions" / f"{name}.parquet").exists()

    events = read_events(run.run_dir)
    for task in ("detection", "classification"):
        assert [e["epoch"] for e in events if e["kind"] == "epoch" and e["task"] == task] == [1, 2]
        steps = [e["step"] for e in events if e["kind"] == "step" and e["task"] == task]
        assert steps == list(range(1, len(steps) + 1))
        assert run.export_path(task).exists()
    assert [e["status"] for e in events if e["kind"] == "task"] == ["started", "finished"] * 2

    contents = torch.load(run.export_path("classification"), weights_only=True)
    assert contents["codes"] == run.codes

    with pytest.raises(UserError, match="finished run"):
        open_run(run.run_dir, tiny(**TARGETS), toy_manifest, toy_tree)
    with pytest.raises(UserError, match=r"classification\.epochs was 2 and is 3"):
        open_run(run.run_dir, tiny(classification__epochs=3, **TARGETS), toy_manifest, toy_tree)


def test_each_missed_target_is_one_line(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, lines = call(monkeypatch, "evaluate", "--run", run_dir)
    top1 = json.loads((run_dir / "metrics.json").read_text())["classification"]["top1"]
    assert top1 < 1.0, "the toy classifier became too good for this test"
    assert code == 1
    missed = [line for line in lines if "the target of" in line or "cannot be used" in line]
    assert missed[0] == f"Classification top-1 is {100 * top1:.2f} %, below the target of 100.00 %."
    assert len(missed) == 2 and missed[1].startswith("Detection mAP@0.5 is ")
    assert read_events(run_dir)[-1]["kind"] == "verdict"
    assert "pillsnap.events: verdict met=False" in (run_dir / "train.log").read_text()

    code, lines = call(monkeypatch, "verify", "--run", run_dir)
    assert code == 1
    text = " ".join(lines)
    for item in (r"no\s+targets", r"ok\s+detection: best model", r"ok\s+total time", r"ok\s+restarts"):
        assert re.search(item, text), item


def test_missing_checkpoint_is_named(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_dir / "checkpoints"
    shutil.rmtree(folder / "classification")
    (folder / "demo_classification_best.pt").unlink()
    code, lines = call(monkeypatch, "evaluate", "--run", run_dir)
    assert code == 1
    assert f"The best classification model cannot be used: {folder}/demo_classification_best.pt is missing." in lines
    assert f"The classification task has no checkpoint in {folder}/classification." in lines
    assert "Classification top-1 has no value: the classification task was not evaluated in this run." in lines
    assert not any(line.startswith("The best detection") for line in lines)
    code, lines = call(monkeypatch, "verify", "--run", run_dir)
    assert code == 1 and any("classification: best model" in line for line in lines)


def test_damaged_checkpoint_is_named(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_dir / "checkpoints" / "detection"
    best = folder / json.loads((folder / "best.json").read_text())["checkpoint"]
    for other in set(folder.glob("step-*")) - {best}:  # which would be evaluated instead
        shutil.rmtree(other)
    weights = best / "ema.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    exported = run_dir / "checkpoints" / "demo_classification_best.pt"
    exported.write_bytes(exported.read_bytes()[: exported.stat().st_size // 2])
    code, lines = call(monkeypatch, "evaluate", "--run", run_dir)
    assert code == 1
    damaged = f"{weights} is damaged: its sha256 is not the recorded one."
    damaged = f"The best detection checkpoint cannot be used: {damaged}"
    assert [line for line in lines if line.startswith("The best detection")] == [damaged]
    (line,) = (line for line in lines if line.startswith("The best classification model cannot be used"))
    assert f"{exported} is damaged" in line
    metrics = json.loads((run_dir / "metrics.json").read_text())
    assert metrics["detection"] is None and metrics["met"] is False
    report = (run_dir / "report.html").read_text()
    assert "is damaged: its sha256 is not the recorded one." in report
    assert not (run_dir / "predictions" / "detections.parquet").exists()


def test_run_without_a_checkpoint_is_not_met(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for task in ("detection", "classification"):
        shutil.rmtree(run_dir / "checkpoints" / task)
    code, lines = call(monkeypatch, "evaluate", "--run", run_dir)
    assert code == 1
    assert len([line for line in lines if "has no checkpoint in" in line]) == 2
