"""Which models of a run can be used, known without torch: whoever asks need not load a model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pillsnap.errors import UserError
from pillsnap.runs.checkpoint import Checkpoint
from pillsnap.runs.remote_checkpoints import find_run_checkpoint
from pillsnap.storage import join


def best_checkpoints(where: str | Path, tasks: Iterable[str]) -> tuple[dict[str, Checkpoint], list[str]]:
    """The best checkpoint of each task that has one, and a line for each task whose best is missing or damaged.

    Raises OSError when one cannot be read.
    """
    found: dict[str, Checkpoint] = {}
    problems = []
    for task in tasks:
        checkpoint, damaged = find_run_checkpoint(where, task, "best")
        if checkpoint is not None:
            found[task] = checkpoint
        elif not damaged:
            problems.append(f"The {task} task has no checkpoint in {join(str(where), f'checkpoints/{task}')}.")
        instead = f" {checkpoint.path.name} is used instead." if checkpoint is not None else ""
        problems += [f"The best {task} checkpoint cannot be used: {text}{instead}" for text in damaged[:1]]
    return found, problems


def require_models(where: str | Path, tasks: Iterable[str]) -> list[str]:
    """The problems of `best_checkpoints`. Raises UserError when no task has a checkpoint, OSError when one cannot be
    read.
    """
    found, problems = best_checkpoints(where, tasks)
    if not found:
        raise untrained(where)
    return problems


def untrained(where: str | Path) -> UserError:
    """The error of a run that has no model yet."""
    return UserError(f"{where} has no complete checkpoint: train it first, with `pillsnap train --run {where}`.")
