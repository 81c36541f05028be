"""The demo starts a run, or continues the existing one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from pillsnap import demo
from pillsnap.cli import app
from pillsnap.cli.terminal import STOPPED
from pillsnap.runs.directory import Run
from pillsnap.train.driver import RunStopped


def test_demo_starts_a_run_and_continues_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[str] = []

    def trained(run: Run, console: Console) -> dict[str, Any]:
        runs.append(run.run_id)
        return {"met": True}

    monkeypatch.setattr("pillsnap.train.driver.train_and_evaluate", trained)
    for name, value in {"_SINGLES": 48, "_COMBINATIONS": 18, "_FRAME": (122, 160)}.items():
        monkeypatch.setattr(demo, name, value)
    for _ in range(2):
        assert demo.run_demo(tmp_path / "demo", Console(quiet=True)) == {"met": True}
    assert len(set(runs)) == 1


def test_stopped_demo_says_how_to_continue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(run_dir: Path, console: Console) -> dict[str, Any]:
        raise RunStopped("detection stopped in epoch 4.")

    monkeypatch.setattr(demo, "run_demo", stopped)
    result = CliRunner().invoke(app, ["demo", "--run", str(tmp_path / "demo")])
    assert result.exit_code == STOPPED
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert "detection stopped in epoch 4. Give the same command again to continue." in result.output
