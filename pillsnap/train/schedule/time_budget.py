"""The time budget of a run, and what of it each task may take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc

from pillsnap.config import TASKS
from pillsnap.errors import UserError
from pillsnap.evaluate.answers import MAX_FITTED
from pillsnap.observe.events import read_events
from pillsnap.runs.directory import Run
from pillsnap.runs.elapsed import ElapsedTime
from pillsnap.runs.extension import is_trained
from pillsnap.runs.remote_checkpoints import find_run_checkpoint


@dataclass(frozen=True)
class TimeBudget:
    """What the tasks of a run may take, and this one of them."""

    total_s: float
    """For the whole run with its evaluation."""
    spent_s: float
    """By the tasks before this one."""
    share: float
    """Share of the time left that this task may take; 1 for the last one."""
    num_judged: int
    """Photos that the evaluation reads."""
    judging_s: float = 0.0
    """Seconds for them that the validation of the tasks before this one would take."""


def task_budget(run: Run, name: str) -> TimeBudget | None:
    """What task `name` of the run may take; None without a time budget. Tasks share the time by their planned work,
    pixels trained: epochs times samples times input size. Raises UserError when nothing is left.
    """
    minutes = run.settings.train.time_budget_minutes
    if minutes is None:
        return None
    shown = run.manifest["codes"].filter(pc.equal(run.manifest["split"], "train"))
    samples = {"detection": len(shown), "classification": pc.sum(pc.list_value_length(shown)).as_py() or 0}
    num_val = pc.sum(pc.equal(run.manifest["split"], "val")).as_py() or 0
    num_fitted = min(MAX_FITTED, len(shown)) if "classification" in run.settings.tasks else 0
    events, work, spent_s, judging_s = read_events(run.run_dir), dict[str, float](), 0.0, 0.0
    for task in TASKS:
        settings = getattr(run.settings, task)
        last, _ = find_run_checkpoint(run.where, task, role="driver")
        if task == name or (task in run.settings.tasks and not is_trained(last, settings.epochs)):
            num_samples = settings.samples_per_epoch or samples[task]
            work[task] = settings.epochs * num_samples * settings.image_size_px**2
        if task != name:
            spent_s += ElapsedTime(run.checkpoint_dir(task), last.meta["elapsed_s"] if last else 0.0).before_s
            judging_s += num_val * _validation_s_per_sample(events, task)
    if spent_s >= 60 * minutes:
        raise UserError(
            f"train.time_budget_minutes={minutes:g} leaves no time for {name}: {spent_s / 60:.0f} minutes are spent. "
            "Raise it or set it to null."
        )
    return TimeBudget(60 * minutes, spent_s, work[name] / max(sum(work.values()), 1), num_val + num_fitted, judging_s)


def _validation_s_per_sample(events: list[dict[str, Any]], task: str) -> float:
    """By the last validation in the log; 0 without one."""
    of_task = [event for event in reversed(events) if event.get("task") == task]
    duration_s = next((event["duration_s"] for event in of_task if event["kind"] == "validation"), 0.0)
    return duration_s / next((event["num_val"] for event in of_task if event.get("num_val")), 1)
