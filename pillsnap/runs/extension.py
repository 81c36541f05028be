"""Extends a run beyond its decay: it goes on from the checkpoint before it, as if it had been planned so."""

from __future__ import annotations

from pillsnap.config import TASKS, Settings
from pillsnap.errors import UserError
from pillsnap.runs.checkpoint import Checkpoint, return_to_branch
from pillsnap.runs.remote_checkpoints import PublishedCheckpoints, find_run_checkpoint
from pillsnap.storage import is_uri, join

_LIMITS = {"budget": "time_budget_minutes", "patience": "patience"}
"""The settings in `train` from which an early decay follows, by its reason."""


def last_epoch(checkpoint: Checkpoint, epochs: int) -> int:
    """The last epoch, from 1, of a run of `epochs` epochs: less when the checkpoint is within an early decay."""
    schedule = checkpoint.meta.get("schedule", {"reason": "planned"})
    if schedule["reason"] == "planned":
        return epochs
    begun = schedule["first_step"] + 1
    ended = schedule.get("end_step", begun)  # not in older checkpoints; before `begun` when no step was left
    return schedule["end_epoch"] if checkpoint.position.global_step >= min(begun, ended) else epochs


def is_trained(last: Checkpoint | None, epochs: int) -> bool:
    """Whether the `last` checkpoint of a task with `epochs` epochs is the one at its end."""
    return last is not None and last.position.epoch >= last_epoch(last, epochs)


def awaits_validation(last: Checkpoint | None, epochs: int) -> bool:
    """Whether training has ended between two validations, so that a start which only validates has to follow."""
    schedule = last.meta.get("schedule", {}) if last else {}
    if last is None or not schedule.get("ends_between_validations"):
        return False
    return last.position.global_step >= schedule["end_step"] and not is_trained(last, epochs)


def extend(where: str, before: Settings, now: Settings) -> list[str]:
    """Set tasks of the run at `where` (folder or URI) back to before their decay where more epochs, more time or more
    patience are given than `before`. Returns a line for each.

    Raises UserError when that is not possible; then nothing is changed.
    """
    found = [(task, _branch(where, task, before, now)) for task in TASKS]
    for task, branch in found:
        if branch is not None:
            if is_uri(where):
                PublishedCheckpoints(where, task, "driver").return_to_branch()
            else:
                return_to_branch(branch.path.parent)
    return [f"{task} goes on from {branch.path.name}, before its decay" for task, branch in found if branch is not None]


def way_out(where: str, name: str, tasks: list[str]) -> str:
    """How to train more from the models of a run that cannot be extended."""
    models = [f"--set {task}.weights={join(where, f'checkpoints/{name}_{task}_best.pt')}" for task in tasks]
    return f"train more in another directory, starting from its models, with --run OTHER {' '.join(models)}"


def _branch(where: str, task: str, before: Settings, now: Settings) -> Checkpoint | None:
    """The checkpoint to go back to; None when there is no need to."""
    old, new = getattr(before, task).epochs, getattr(now, task).epochs
    if new == old and all(getattr(now.train, limit) == getattr(before.train, limit) for limit in _LIMITS.values()):
        return None
    last, _ = find_run_checkpoint(where, task, role="driver")
    if last is None or "schedule" not in last.meta:
        return None
    schedule = last.meta["schedule"]
    if new < old:
        raise UserError(
            f"{where} has begun to train {task} for {old} epochs, which cannot become {new}: give {task}.epochs={old}; "
            "a smaller train.time_budget_minutes ends it earlier."
        )
    limit = _LIMITS.get(schedule["reason"])
    raised = limit is not None and _is_more(getattr(now.train, limit), getattr(before.train, limit))
    if last.position.global_step <= schedule["branch_step"] or not (new > old or raised):
        return None
    if limit is not None and not raised:
        raise UserError(
            f"The decay of {task} in {where} began because of train.{limit}, not of its {old} epochs: "
            f"to extend it, set train.{limit} higher or to null as well."
        )
    branch, _ = find_run_checkpoint(where, task, "branch", "driver")
    if branch is None or branch.position.global_step != schedule["branch_step"]:
        raise UserError(
            f"{where} has no checkpoint of {task} from before anything depended on its {old} epochs, so that it cannot "
            f"be extended: {way_out(where, before.name, [task])}."
        )
    return branch


def _is_more(now: float | None, before: float | None) -> bool:
    return before is not None and (now is None or now > before)
