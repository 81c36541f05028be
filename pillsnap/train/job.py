"""TODO docstring."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from pillsnap.config import DataSettings, TrainSettings
from pillsnap.data.plan import StreamPlan
from pillsnap.observe.events import EventSink
from pillsnap.runs.checkpoint import Checkpoint
from pillsnap.tasks.base import Task


@dataclass
class Job:
    """What one worker trains, and where it writes. Only the worker of rank 0 has an event log."""

    task: Task
    plan: StreamPlan
    train: TrainSettings
    data: DataSettings
    device: torch.device
    run_dir: Path
    meta: dict[str, Any]
    """Goes into every checkpoint: config, codes, manifest hash, versions."""
    resume: Checkpoint | None
    elapsed_before_s: float
    """Seconds that the task took before this worker began."""
    events: EventSink | None
    sample_ids: Callable[[list[int]], list[str]]
    """Names of training samples, for messages."""
    stop_requested: Callable[[], bool]
    preempted: Callable[[], bool]
    """Whether a node is about to be taken away; asked by every worker at the same steps."""
    report: Callable[[dict[str, float]], None]
    """Called by every worker once an epoch, after its checkpoint is on disk."""
    publish: Publish | None = None
    """Uploads a checkpoint that is on disk, when the run is kept elsewhere."""
    share: Callable[[Path], None] | None = None
    """Hands in a file that was written to run_dir, when the run is kept elsewhere."""


class Publish(Protocol):
    """Uploads a committed checkpoint; `announce` writes its event, once it is there and before it counts."""

    def __call__(self, path: Path, *, best: bool, keep: int, announce: Callable[[], None]) -> None: ...
