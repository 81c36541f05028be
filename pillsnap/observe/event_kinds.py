"""What each kind of event carries: the schema of the event log."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Task = Literal["detection", "classification"]
# A diverged loss is a fact worth recording, and JSON has no NaN: not-a-number and infinity are written as null.
Number = float | None


class _Event(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Run(_Event):
    """A run begins or is resumed. `stage` is 1 to 4, or a preset's name where it has no scale step (the demo)."""

    run_id: str
    name: str
    stage: int | str | None
    config: dict[str, Any]
    manifest_hash: str
    num_workers: int | str
    versions: dict[str, Any]


class TaskStatus(_Event):
    """A task starts at (epoch, step), the position it continues from (0, 0 when fresh); has finished; or is skipped."""

    task: Task
    status: Literal["started", "finished", "skipped"]
    epochs: int | None = None
    steps_per_epoch: int | None = None
    batch_size: int | None = None
    num_train: int | None = None
    num_val: int | None = None
    epoch: int = 0
    step: int = 0
    duration_s: Number = None


class Step(_Event):
    """Training progress: `step` counts from 1 over the whole task, `data_wait_fraction` is 0 to 1."""

    task: Task
    epoch: int
    step: int
    loss: Number
    losses: dict[str, Number] = {}
    lr: Number = None
    images_per_s: Number = None
    data_wait_fraction: Number = None
    gpu_memory_bytes: int | None = None
    eta_s: Number = None


class Epoch(_Event):
    """An epoch (from 1) is trained; `loss` is its mean, `loader_ms` what an image took in each stage of the loader."""

    task: Task
    epoch: int
    step: int
    loss: Number
    images_per_s: Number = None
    data_wait_fraction: Number = None
    duration_s: Number = None
    loader_ms: dict[str, Number] | None = None


class Validation(_Event):
    """Validation figures after an epoch; `best` says that they are the best so far."""

    task: Task
    epoch: int
    step: int
    metrics: dict[str, Number]
    best: bool = False
    duration_s: Number = None


class Checkpoint(_Event):
    """A checkpoint is complete on storage."""

    task: Task
    epoch: int
    step: int
    path: str
    best: bool = False


class Quarantine(_Event):
    """A photo could not be used."""

    task: Task
    sample_id: str
    reason: str


class Warn(_Event):
    """Something a person should know, that does not stop the run."""

    message: str


class Failure(_Event):
    """The run or a worker stopped: what happened, why, and what to do."""

    message: str
    cause: str = ""
    advice: str = ""


class System(_Event):
    """What a node of the run is doing; the figures are those of `telemetry.sample`, `node` its name."""

    node: str
    gpus: list[dict[str, Any]] = []
    cpu_fraction: Number = None
    host_memory_used_bytes: int | None = None
    host_memory_total_bytes: int | None = None
    disk_free_bytes: int | None = None
    disk_total_bytes: int | None = None


class Examples(_Event):
    """A picture of example predictions; `path` is a PNG relative to the run directory."""

    task: Task
    epoch: int
    path: str


class Target(_Event):
    """One target of the verdict."""

    target: Number
    value: Number
    met: bool


class Verdict(_Event):
    """The run is judged against its targets."""

    met: bool
    targets: dict[str, Target]
    metrics_path: str = ""
    report_path: str = ""


KINDS: dict[str, type[_Event]] = {
    "run": Run,
    "task": TaskStatus,
    "step": Step,
    "epoch": Epoch,
    "validation": Validation,
    "checkpoint": Checkpoint,
    "quarantine": Quarantine,
    "warning": Warn,
    "failure": Failure,
    "system": System,
    "examples": Examples,
    "verdict": Verdict,
}
