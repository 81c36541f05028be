"""`pillsnap verify`: models, checkpoints, targets, time, restarts, and what the next stage needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pillsnap.checklist import Check
from pillsnap.config import load_settings
from pillsnap.evaluate import verify
from pillsnap.evaluate.verify import exported_problems, verify_run
from pillsnap.manifest.table import read_manifest
from pillsnap.observe.events import EventLog
from pillsnap.runs.best_checkpoints import best_checkpoints
from pillsnap.runs.checkpoint import Position, save_checkpoint
from pillsnap.runs.directory import Run, open_run


@pytest.fixture
def run(toy_manifest: Path, toy_tree: Path, tmp_path: Path) -> Run:
    """A finished stage 3 of the classification task alone, with toy weights."""
    settings = load_settings("stage3", {"train.task": "classification"})
    found, _ = open_run(tmp_path / "stage3", settings, toy_manifest, toy_tree)
    for epoch in (1, 2, 3):
        weights = {"w": torch.full((2,), float(epoch))}
        save_checkpoint(
            found.checkpoint_dir("classification"), Position(epoch, 0, epoch), model=weights, ema=weights, trainer={},
            meta={"elapsed_s": 1.0}, best=epoch == 2, keep=2,
        )  # fmt: skip
    torch.save({"state_dict": {}, "codes": found.codes, "model": "m"}, found.export_path("classification"))
    record_metrics(found, [], {"total_time_s": {"target": 7200.0, "value": 5400.0, "met": True}})
    log(found)
    return found


def record_metrics(run: Run, misses: list[str], targets: dict[str, Any]) -> None:
    metrics = {"misses": misses, "targets": targets, "total_time_s": targets["total_time_s"]["value"]}
    (run.run_dir / "metrics.json").write_text(json.dumps(metrics))


def log(run: Run, *more: tuple[str, dict[str, Any]]) -> None:
    start = {"name": "s", "stage": 3, "config": {}, "manifest_hash": "h", "num_workers": 1, "versions": {}}
    with EventLog(run.run_dir) as events:
        events.write("run", run_id="r", **start)
        for kind, fields in more:
            events.write(kind, **fields)


def by_name(run: Run) -> dict[str, Check]:
    return {check.name: check for check in verify_run(run)}


def test_complete_run_lacks_only_the_next_manifest(
    run: Run, monkeypatch: pytest.MonkeyPatch, toy_manifest: Path
) -> None:
    checks = by_name(run)
    assert [name for name, check in checks.items() if not check.ok] == ["stage 4: manifest"]
    assert "pillsnap manifest build --stage 4" in checks["stage 4: manifest"].advice
    assert checks["classification: best checkpoint"].found == "step-00000002-epoch-0002, every file as recorded"
    assert checks["classification: last checkpoint"].found == "step-00000003-epoch-0003, every file as recorded"
    assert checks["total time"].found == "1 h 30 min, the target is 2 h 00 min"
    assert checks["restarts"].found == "starts of the run: 1, failures: 0"
    assert model_problems(run) == []

    toy = read_manifest(toy_manifest)

    def next_manifest(path: Path) -> Any:
        assert path == run.run_dir.parent / "stage4"
        return toy

    monkeypatch.setattr(verify, "read_manifest", next_manifest)
    check = by_name(run)["stage 4: manifest"]
    assert check.ok is False and check.found.startswith(f"{len(toy):,} of 500,000 photos in ")
    monkeypatch.setattr(verify, "read_manifest", lambda path: range(500_000))
    assert by_name(run)["stage 4: manifest"].ok is True


def test_missed_targets_and_too_long_a_time(run: Run) -> None:
    misses = ["Total time is 3 h 00 min, above the target of 2 h 00 min."]
    record_metrics(run, misses, {"total_time_s": {"target": 7200.0, "value": 10800.0, "met": False}})
    checks = by_name(run)
    assert checks["targets"].ok is False and checks["targets"].found == misses[0]
    assert checks["total time"].ok is False
    (run.run_dir / "metrics.json").unlink()
    assert by_name(run)["targets"].found == "not evaluated yet"


def model_problems(run: Run) -> list[str]:
    return exported_problems(run) + best_checkpoints(run.where, run.settings.tasks)[1]


@pytest.mark.parametrize("damage", ["torn", "missing", "export"])
def test_damage_is_named(run: Run, damage: str) -> None:
    best = run.checkpoint_dir("classification") / "step-00000002-epoch-0002"
    if damage == "torn":
        (best / "ema.safetensors").write_bytes(b"torn")
        name, text = "classification: best checkpoint", f"{best / 'ema.safetensors'} is damaged"
    elif damage == "missing":
        (best / "trainer.pt").unlink()
        name, text = "classification: best checkpoint", f"{best / 'trainer.pt'} is missing."
    else:
        run.export_path("classification").write_bytes(b"PK torn")
        name, text = "classification: best model", f"{run.export_path('classification')} is damaged"
    checks = by_name(run)
    assert checks[name].ok is False and text in checks[name].found
    (problem,) = model_problems(run)
    assert text in problem and "\n" not in problem
    assert ("step-00000003-epoch-0003 is used instead." in problem) == (damage != "export")


def test_failure_counts_until_the_run_is_evaluated(run: Run) -> None:
    log(run, ("failure", {"message": "worker 0 died"}))
    check = by_name(run)["restarts"]
    assert check.ok is False and (check.found, check.advice) == ("starts of the run: 2, failures: 1", "worker 0 died")
    log(run, ("verdict", {"met": True, "targets": {}}))
    assert by_name(run)["restarts"].ok is True
