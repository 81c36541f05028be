"""A run is finished when its log says so: every task has ended, and then the run was evaluated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pillsnap.config import load_settings
from pillsnap.errors import UserError
from pillsnap.observe.events import EventLog
from pillsnap.runs.directory import CONFIG_FILE, open_run

SETTINGS = load_settings("demo")
START = {"kind": "run", "run_id": "r", "name": "demo", "stage": None, "config": {}, "manifest_hash": "h",
         "num_workers": 1, "versions": {}}  # fmt: skip
EVALUATED = {"kind": "verdict", "met": False, "targets": {}}


def task(name: str, status: str) -> dict[str, Any]:
    return {"kind": "task", "task": name, "status": status}


INTERRUPTED = [START, task("detection", "started"), task("detection", "finished"), task("classification", "started")]
TRAINED = [*INTERRUPTED, task("classification", "finished")]
CONTINUED = [START, task("detection", "skipped"), task("classification", "started"), task("classification", "finished")]


@pytest.mark.parametrize(
    ("events", "finished"),
    [
        ([], False),
        (INTERRUPTED, False),
        ([*INTERRUPTED, EVALUATED], False),
        (TRAINED, False),  # killed before its evaluation
        ([*TRAINED, EVALUATED], True),
        ([*INTERRUPTED, EVALUATED, *CONTINUED], False),  # the evaluation is that of the unfinished run
        ([*INTERRUPTED, EVALUATED, *CONTINUED, EVALUATED], True),
        ([*TRAINED, EVALUATED, START, task("detection", "started"), EVALUATED], False),  # a lost task is trained again
    ],
)
@pytest.mark.parametrize("has_metrics", [False, True])
def test_same_command_continues_until_the_log_has_the_end(
    events: list[dict[str, Any]], finished: bool, has_metrics: bool, toy_manifest: Path, toy_tree: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    run, _ = open_run(run_dir, SETTINGS, toy_manifest, toy_tree)
    if has_metrics:
        (run_dir / "metrics.json").write_text("{}")
    with EventLog(run_dir) as log:
        for event in events:
            log.write(**event)
    if finished:
        with pytest.raises(UserError, match="holds a finished run"):
            open_run(run_dir, SETTINGS, toy_manifest, toy_tree)
    again, notes = open_run(run_dir, SETTINGS, toy_manifest, toy_tree, resume=finished)
    assert again.run_id == run.run_id and notes == [f"continuing the run {run.run_id} in {run_dir}"]


def test_another_task_of_a_finished_run_is_trained(toy_manifest: Path, toy_tree: Path, tmp_path: Path) -> None:
    settings = load_settings("demo", {"train.task": "detection"})
    open_run(tmp_path, settings, toy_manifest, toy_tree)
    with EventLog(tmp_path) as log:
        for event in (START, task("detection", "started"), task("detection", "finished"), EVALUATED):
            log.write(**event)
    with pytest.raises(UserError, match="holds a finished run"):
        open_run(tmp_path, settings, toy_manifest, toy_tree)
    for _ in range(2):  # and goes on after an interrupt
        assert "continuing the run" in open_run(tmp_path, SETTINGS, toy_manifest, toy_tree)[1][0]


def test_run_from_before_a_setting_existed_continues_with_its_default(
    toy_manifest: Path, toy_tree: Path, tmp_path: Path
) -> None:
    run, _ = open_run(tmp_path, SETTINGS, toy_manifest, toy_tree)
    path = tmp_path / CONFIG_FILE
    config = json.loads(path.read_text(encoding="utf-8"))
    assert config["settings"]["detection"].pop("validate_every") == 1
    path.write_text(json.dumps(config), encoding="utf-8")
    other = load_settings("demo", {"detection.validate_every": 2})
    with pytest.raises(UserError, match=r"detection.validate_every was 1 and is 2"):
        open_run(tmp_path, other, toy_manifest, toy_tree)
    assert open_run(tmp_path, SETTINGS, toy_manifest, toy_tree)[1] == [f"continuing the run {run.run_id} in {tmp_path}"]
