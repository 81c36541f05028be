"""The demo begins a run where there is none, and goes on with the one that is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pillsnap import demo
from pillsnap.train.run_directory import Run


def test_the_demo_begins_and_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[str] = []

    def trained(run: Run, console: Console) -> dict[str, Any]:
        runs.append(run.run_id)
        return {"met": True}

    monkeypatch.setattr("pillsnap.train.run.train_and_judge", trained)
    for name, value in {"_SINGLES": 48, "_COMBINATIONS": 18, "_FRAME": (122, 160)}.items():
        monkeypatch.setattr(demo, name, value)
    for _ in range(2):
        assert demo.run_demo(tmp_path / "demo", Console(quiet=True)) == {"met": True}
    assert len(set(runs)) == 1
