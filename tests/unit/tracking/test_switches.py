"""W&B off, without an account, or set up by its own variables and files: what is sent, recorded and said."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from pillsnap.observe.events import EventLog
from pillsnap.tracking.follower import has_key
from pillsnap.tracking.mirror import WandbMirror
from tests.unit.tracking.recorded_events import (
    History,
    expected_rows,
    offline_folders,
    rows_of,
    write_epochs,
    write_run,
)  # fmt: skip


def test_disabled_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with EventLog(tmp_path) as log:
        write_run(log)
        write_epochs(log, "detection", 1, 1)
    assert WandbMirror(tmp_path, "pillsnap", mode="disabled").start().close() == []
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert WandbMirror(tmp_path, "pillsnap").start().close() == []
    assert [path.name for path in tmp_path.iterdir()] == ["events.jsonl"]


def test_key_in_the_environment_or_netrc(monkeypatch: pytest.MonkeyPatch) -> None:
    public, other = "https://api.example.org", "https://wandb.example.org"
    assert not has_key(public, public)
    Path(os.environ["NETRC"]).write_text("machine api.wandb.ai login user password abc\n")
    assert has_key(public, public) and not has_key(other, public)
    Path(os.environ["NETRC"]).write_text("machine wandb.example.org login user password abc\n")
    assert has_key(other, public) and not has_key(public, public)
    Path(os.environ["NETRC"]).unlink()
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert has_key(public, public)


@pytest.mark.parametrize(
    "name, value, chosen, mode",
    [
        ("WANDB_MODE", "dryrun", "auto", "offline"),
        ("WANDB_MODE", "Disabled", "auto", "disabled"),
        ("WANDB_MODE", "disabled", "online", "disabled"),
        ("WANDB_MODE", "offline", "online", "offline"),
        ("WANDB_MODE", "online", "offline", "offline"),
        ("WANDB_DISABLED", "true", "online", "disabled"),
        ("WANDB_DISABLED", "false", "online", "online"),
    ],
)
def test_switches_of_wandb_are_obeyed(
    name: str, value: str, chosen: Any, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    assert WandbMirror(tmp_path, "pillsnap", mode=chosen).mode == mode


def test_wandb_turned_off_by_its_settings_file_makes_no_request(
    tmp_path: Path, wandb_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", wandb_server.url)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb/settings").write_text("[default]\nmode = disabled\n")
    monkeypatch.chdir(tmp_path)
    with EventLog(tmp_path / "run") as log:
        write_run(log)
        write_epochs(log, "detection", 1, 1)
    warnings: list[str] = []
    assert WandbMirror(tmp_path / "run", "pillsnap", on_warning=warnings.append).start().close() == []
    assert (warnings, wandb_server.upserts, wandb_server.rows) == ([], [], {})


def test_sweep_variables_and_modules_in_the_working_directory_do_not_leak_in(
    tmp_path: Path, offline_history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"WANDB_RUN_ID": "same", "WANDB_SWEEP_ID": "s", "WANDB_PROJECT": "theirs"}.items():
        monkeypatch.setenv(name, value)
    for module in ("random", "queue", "wandb"):
        (tmp_path / f"{module}.py").write_text("raise SystemExit('shadowed')")
    monkeypatch.chdir(tmp_path)
    run_dir, said, warnings = tmp_path / "run", [], []
    with EventLog(run_dir) as log, WandbMirror(run_dir, "pillsnap", on_warning=warnings.append, say=said.append):
        write_run(log)
        for task in ("detection", "classification"):
            write_epochs(log, task, 1, 1)
    assert warnings == []
    assert all(len(offline_folders(run_dir, task)) == 1 for task in ("detection", "classification"))
    assert [line.split()[0] for line in said[:2]] == ["WANDB_RUN_ID", "WANDB_SWEEP_ID"]
    assert WandbMirror(run_dir, "pillsnap").project == "theirs" and WandbMirror(run_dir, "own").project == "own"


def test_invalid_key_records_offline(
    tmp_path: Path, wandb_server: Any, offline_history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", wandb_server.url)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    wandb_server.refuse_all = True
    warnings: list[str] = []
    with EventLog(tmp_path) as log, WandbMirror(tmp_path, "pillsnap", mode="online", on_warning=warnings.append):
        write_run(log)
        write_epochs(log, "detection", 1, 2)
    (warning,) = warnings
    assert "recorded offline, training continues" in warning and "k" * 40 not in warning
    (folder,) = offline_folders(tmp_path, "detection")
    assert rows_of(offline_history(folder)) == expected_rows(2)
