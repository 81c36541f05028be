"""Job: everything the training loop of one worker needs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from pillsnap.config import DataSettings, TrainSettings
from pillsnap.data.plan import StreamPlan
from pillsnap.observe.events import EventSink
from pillsnap.runs.backend import RunBackend
from pillsnap.runs.checkpoint import Checkpoint
from pillsnap.tasks.base import Task
from pillsnap.train.schedule.time_budget import TimeBudget


@dataclass
class Job:
    """What one worker trains, and where it writes."""

    task: Task
    plan: StreamPlan
    train: TrainSettings
    data: DataSettings
    device: torch.device
    backend: RunBackend
    meta: dict[str, Any]
    """Part of every checkpoint: config, codes, manifest hash, versions."""
    resume: Checkpoint | None
    elapsed_before_s: float
    """Seconds that the task took before this worker started."""
    events: EventSink | None
    """The run's event log on rank 0, None on all other workers."""
    sample_ids: Callable[[list[int]], list[str]]
    """Ids of training samples by number, for messages."""
    preempted: Callable[[], bool]
    """Whether a node is about to be preempted; called by all workers at the same steps."""
    report: Callable[[dict[str, float]], None]
    """Called by all workers once per validated epoch, after its checkpoint is published."""
    budget: TimeBudget | None = None
    """The time that the task may take; rank 0 keeps it."""
    started_s: float = field(default_factory=time.monotonic)

    def elapsed_s(self) -> float:
        """Seconds that the task took so far, under all drivers."""
        return self.elapsed_before_s + time.monotonic() - self.started_s
