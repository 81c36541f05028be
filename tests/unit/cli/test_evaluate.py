"""`pillsnap evaluate` holds the run's lock: it does not write into a run that is being trained, and the reverse."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pillsnap.cli import app
from pillsnap.config import load_settings
from pillsnap.errors import UserError
from pillsnap.runs.directory import Run, only_driver, open_run


@pytest.fixture
def run(toy_manifest: Path, toy_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr("pillsnap.cluster.session.ray_session", nullcontext)
    return open_run(tmp_path / "run", load_settings("demo"), toy_manifest, toy_tree)[0]


def test_evaluation_of_a_run_in_training_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pillsnap.evaluate.evaluator.evaluate_run", lambda *_, **__: pytest.fail("evaluated"))
    with only_driver(run.run_dir):
        before = sorted(run.run_dir.iterdir())
        result = CliRunner().invoke(app, ["evaluate", "--run", str(run.run_dir)])
        assert sorted(run.run_dir.iterdir()) == before
    assert result.exit_code == 2
    assert result.output.startswith(f"pillsnap: Process {os.getpid()} is training in {run.run_dir}: wait for it")
    assert len(result.output.strip().splitlines()) == 1


def test_training_does_not_start_during_an_evaluation(
    run: Run, monkeypatch: pytest.MonkeyPatch, toy_manifest: Path, toy_tree: Path
) -> None:
    def evaluate(evaluated: Run, compare: Any, split: str, **_: Any) -> dict[str, Any]:
        with pytest.raises(UserError, match=f"Process {os.getpid()} "):
            open_run(run.run_dir, run.settings, toy_manifest, toy_tree)
        return {"met": True}

    monkeypatch.setattr("pillsnap.evaluate.evaluator.evaluate_run", evaluate)
    monkeypatch.setattr("pillsnap.cli.results.show_result", lambda *_: None)
    result = CliRunner().invoke(app, ["evaluate", "--run", str(run.run_dir)])
    assert result.exit_code == 0, result.output
    open_run(run.run_dir, run.settings, toy_manifest, toy_tree)


def test_folder_that_is_no_run_stays_as_it_is(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["evaluate", "--run", str(tmp_path / "none")])
    assert result.exit_code == 2 and "is not a run" in result.output
    assert list(tmp_path.iterdir()) == []
