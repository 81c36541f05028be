"""Checks that a run is complete and evaluated, and ready for the next stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pillsnap.checklist import Check
from pillsnap.errors import UserError
from pillsnap.evaluate.targets import duration
from pillsnap.files import MISSING
from pillsnap.manifest.table import read_manifest
from pillsnap.observe.events import read_events
from pillsnap.runs.directory import Run
from pillsnap.runs.remote_checkpoints import find_run_checkpoint
from pillsnap.storage import folder_of, join, local_manifest

_LAST_STAGE = 4


def verify_run(run: Run) -> list[Check]:
    """Check checkpoint integrity, targets, restarts and the manifest of the next stage; reads only."""
    checks = [check for task in run.settings.tasks for check in _checkpoint_checks(run, task)]
    return [*checks, *_target_checks(run), _restart_check(run.run_dir), *_next_stage_checks(run)]


def exported_problems(run: Run) -> list[str]:
    """One line for each exported best model of the run that is missing or damaged."""
    problems = ((task, exported_model_problem(run.export_path(task), task)) for task in run.settings.tasks)
    return [f"The best {task} model cannot be used: {problem}." for task, problem in problems if problem]


def exported_model_problem(path: Path, task: str) -> str:
    """Why an exported best model cannot be used; empty when it can."""
    import torch

    try:
        path.open("rb").close()
    except MISSING:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror}): check its owner and permissions"
    try:
        if task == "classification":
            contents = torch.load(path, map_location="cpu", weights_only=True)
            return "" if {"state_dict", "codes", "model"} <= set(contents) else f"{path} holds no classifier"
        from pillsnap.models.detector import read_exported

        read_exported(path)
    except Exception as error:  # a damaged file can raise any exception
        return f"{path} is damaged ({type(error).__name__})"
    return ""


def _checkpoint_checks(run: Run, task: str) -> list[Check]:
    problem = exported_model_problem(run.export_path(task), task)
    location = join(run.where, run.export_path(task).relative_to(run.run_dir).as_posix())
    advice = "" if "cannot be read" in problem else "train the task again"
    exported = Check(f"{task}: best model", not problem, problem or location, advice)
    checks = [exported]
    for pointer in ("best", "last"):
        checkpoint, damaged = find_run_checkpoint(run.where, task, pointer)
        found = f"{checkpoint.path.name}, every file as recorded" if checkpoint and not damaged else "; ".join(damaged)
        advice = "the newest complete one is used instead" if checkpoint else "train the task again"
        checks.append(Check(f"{task}: {pointer} checkpoint", bool(checkpoint and not damaged), found or "none", advice))
    return checks


def _target_checks(run: Run) -> list[Check]:
    try:
        metrics: dict[str, Any] = json.loads((run.run_dir / "metrics.json").read_text(encoding="utf-8"))
    except (*MISSING, ValueError):
        return [Check("targets", False, "not evaluated yet", f"run `pillsnap evaluate --run {run.where}`")]
    missed, total_s = metrics["misses"], metrics["total_time_s"]
    target = metrics["targets"].get("total_time_s")
    found = duration(total_s) + (f", the target is {duration(target['target'])}" if target else ", without a target")
    return [
        Check("targets", not missed, "all met" if not missed else " ".join(missed), "see the report"),
        Check("total time", target["met"] if target else None, found, "see Time in the report"),
    ]


def _restart_check(run_dir: Path) -> Check:
    events = read_events(run_dir)
    starts = [event for event in events if event["kind"] == "run"]
    failures = [event["message"] for event in events if event["kind"] == "failure"]
    found = f"starts of the run: {len(starts)}, failures: {len(failures)}"
    stable = not failures or events[-1]["kind"] == "verdict"
    return Check("restarts", stable, found, failures[-1] if failures else "")


def _next_stage_checks(run: Run) -> list[Check]:
    stage = run.settings.stage
    if stage is None or stage >= _LAST_STAGE:
        return []
    from pillsnap.config import load_settings

    folder = folder_of(run.uri) if run.uri else str(run.run_dir.parent)
    path = join(folder, f"stage{stage + 1}")
    wanted = load_settings(f"stage{stage + 1}").sampling.num_photos or 0
    name = f"stage {stage + 1}: manifest"
    advice = f"run `pillsnap manifest build --stage {stage + 1} --exclude {run.where} --out {path}`"
    try:
        count = len(read_manifest(local_manifest(path)))
    except UserError as error:
        return [Check(name, False, str(error), advice)]
    return [Check(name, count >= wanted, f"{count:,} of {wanted:,} photos in {path}", advice)]
