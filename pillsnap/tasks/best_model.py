"""Loads the best model of a trained task from its checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from pillsnap.config import Settings
from pillsnap.errors import UserError
from pillsnap.runs.remote_checkpoints import find_run_checkpoint
from pillsnap.storage import one_line
from pillsnap.tasks.base import Task
from pillsnap.tasks.registry import make_task


@dataclass(frozen=True)
class Best:
    """A task, its best model (moving average, eval mode, on the CPU), the model's validation metrics, and the SHA-256
    of its file of weights.
    """

    task: Task
    model: nn.Module
    metrics: dict[str, float]
    weights_sha256: str


def load_best(where: str | Path, name: str, settings: Settings, codes: list[str], role: str = "reader") -> Best | None:
    """Load the best checkpoint of task `name` of a run in a folder or under a URI; None when there is none.

    `role` selects this node's copy of a remote run.
    """
    checkpoint, _ = find_run_checkpoint(where, name, "best", role)
    if checkpoint is None:
        return None
    task = make_task(name, settings, codes, untrained=True)
    model = task.build()
    try:
        model.load_state_dict(checkpoint.weights("ema"))
    except RuntimeError as error:
        raise UserError(
            f"{checkpoint.path} has no weights of {task.settings.model} ({one_line(error)[:160]}): "
            "its run was changed after the training; name another --run."
        ) from None
    sha256 = checkpoint.meta["files"]["ema.safetensors"]
    return Best(task, model.eval(), checkpoint.meta.get("metrics", {}), sha256)
