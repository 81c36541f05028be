"""The schema of the event log: one model per event kind, with a description of every field."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Task = Literal["detection", "classification"]
# JSON has no NaN: a diverged loss is recorded as null.
Number = float | None


class _Event(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class Run(_Event):
    """A run starts or is resumed."""

    run_id: str
    """Identifies the run; it stays the same when the run is resumed."""
    name: str
    """The setting `name`."""
    stage: int | str | None
    """Scale step, 1 to 4; null or the name of the preset where the preset has none."""
    config: dict[str, Any]
    """All settings, resolved."""
    manifest_hash: str
    """SHA-256 of the manifest, hexadecimal."""
    num_workers: int | str
    """Number of training workers; for an elastic run `MIN:MAX`."""
    versions: dict[str, Any]
    """Versions of Python, the platform and the packages."""


class TaskStatus(_Event):
    """A task starts or resumes, has finished, or is skipped because it was trained before."""

    task: Task
    """The task."""
    status: Literal["started", "finished", "skipped"]
    """The new status."""
    epochs: int | None = None
    """Number of epochs to train."""
    steps_per_epoch: int | None = None
    """Optimizer steps per epoch."""
    batch_size: int | None = None
    """Global batch size: all workers together."""
    num_train: int | None = None
    """Number of training samples."""
    num_val: int | None = None
    """Number of validation samples, the same in every epoch."""
    samples_per_epoch: int | None = None
    """Training samples per epoch."""
    combinations_per_epoch: int | None = None
    """Combination photos among them; null: as many as come."""
    validate_every: int | None = None
    """Epochs from one validation to the next."""
    epoch: int = 0
    """Completed epochs; 0 for a fresh start."""
    step: int = 0
    """Completed steps over the whole task; 0 for a fresh start."""
    duration_s: Number = None
    """Training time of the task over all sessions, in seconds, once finished."""


class InitialWeights(_Event):
    """A task starts from the best model of another run (--from-run)."""

    task: Task
    """The task."""
    source: str
    """Folder or URI of the other run."""
    checkpoint: str
    """Name of its best checkpoint."""
    classes_kept: int | None = None
    """Classes that keep their weights; null for detection."""
    classes_new: int | None = None
    """Classes that the other run did not have."""
    classes_left: int | None = None
    """Classes of the other run that this one does not have."""


class Step(_Event):
    """Training progress, every `train.log_every_steps` steps."""

    task: Task
    """The task."""
    epoch: int
    """Epoch, from 1."""
    step: int
    """Step, counted from 1 over the whole task."""
    loss: Number
    """Total loss."""
    losses: dict[str, Number] = {}
    """Loss terms by name."""
    lr: Number = None
    """Learning rate."""
    images_per_s: Number = None
    """Images per second since the previous step event, all workers together."""
    data_wait_fraction: Number = None
    """Share of the time since the previous step event that the worker of rank 0 waited for data, 0 to 1."""
    gpu_memory_bytes: int | None = None
    """Peak GPU memory allocated by PyTorch; null on a CPU."""
    eta_s: Number = None
    """Estimated seconds left for the training steps of the task."""


class Epoch(_Event):
    """The training steps of an epoch are done."""

    task: Task
    """The task."""
    epoch: int
    """Epoch, from 1."""
    step: int
    """Last step of the epoch, counted over the whole task."""
    loss: Number
    """Mean loss of the epoch."""
    images_per_s: Number = None
    """Images per second over the epoch, all workers together."""
    data_wait_fraction: Number = None
    """Share of the epoch that the worker of rank 0 waited for data, 0 to 1."""
    duration_s: Number = None
    """Duration of the epoch's training steps in seconds."""
    loader_ms: dict[str, Number] | None = None
    """Milliseconds per image in each stage of the loader, in the worker of rank 0."""


class Validation(_Event):
    """Metrics of a validation after an epoch."""

    task: Task
    """The task."""
    epoch: int
    """Epoch, from 1."""
    step: int
    """Last step of the epoch, counted over the whole task."""
    metrics: dict[str, Number]
    """Metrics by name; the task's main metric comes first."""
    best: bool = False
    """Whether this is the best validation so far."""
    duration_s: Number = None
    """Duration of the validation in seconds."""


class Checkpoint(_Event):
    """A checkpoint is complete on storage."""

    task: Task
    """The task."""
    epoch: int
    """Completed epochs in the checkpoint."""
    step: int
    """Completed steps in the checkpoint, counted over the whole task."""
    path: str
    """Folder of the checkpoint, relative to the run directory."""
    best: bool = False
    """Whether it holds the best model so far."""


class Decay(_Event):
    """The learning rate begins to decay, or its decay is shortened, in the schedule `wsd`."""

    task: Task
    """The task."""
    epoch: int
    """Completed epochs."""
    step: int
    """Completed steps, counted over the whole task."""
    reason: Literal["planned", "budget", "patience"]
    """Why it begins: at its planned step, for the time budget, or because validations were not better."""
    end_epoch: int
    """The last epoch of the task, from 1."""
    planned_epochs: int
    """The setting `epochs`."""
    num_steps: int
    """Steps of the decay."""
    share: float
    """Its share of all steps."""


class Budget(_Event):
    """What fits into the time budget, by the rate measured so far."""

    task: Task
    """The task."""
    epoch: int
    """Epoch, from 1."""
    step: int
    """Completed steps, counted over the whole task."""
    planned_epochs: int
    """The setting `epochs`."""
    epochs_fitting: int
    """Epochs that fit, with their decay."""
    decay_step: int
    """Step after which the decay then begins."""
    allowed_s: float
    """Seconds that the task may take, over all sessions."""
    left_s: float
    """Seconds of them that are left."""
    step_s: float
    """Seconds per training step."""
    validation_s: float
    """Seconds per validation."""


class Quarantine(_Event):
    """A photo could not be used."""

    task: Task
    """The task that read the photo."""
    sample_id: str
    """Its `sample_id` in the manifest."""
    reason: str
    """Why it could not be used."""


class Warn(_Event):
    """A message for the user; the run continues."""

    message: str
    """The message."""


class Failure(_Event):
    """The run failed."""

    message: str
    """What happened."""
    cause: str = ""
    """Why it happened, where that is known."""
    advice: str = ""
    """What to do."""


class System(_Event):
    """Load of a node, every 15 s."""

    node: str
    """Host name of the node."""
    gpus: list[dict[str, Any]] = []
    """Per GPU: index, name, memory, utilization, temperature and power; empty without NVML."""
    cpu_fraction: Number = None
    """CPU utilization since the previous event of the node, 0 to 1."""
    host_memory_used_bytes: int | None = None
    """Used memory of the host."""
    host_memory_total_bytes: int | None = None
    """Total memory of the host."""
    disk_free_bytes: int | None = None
    """Free space of the file system that holds the run directory."""
    disk_total_bytes: int | None = None
    """Size of that file system."""


class Examples(_Event):
    """A picture of example predictions."""

    task: Task
    """The task."""
    epoch: int
    """Epoch, from 1."""
    path: str
    """The PNG file, relative to the run directory."""


class Target(_Event):
    """One target of a verdict."""

    target: Number
    """Value to reach."""
    value: Number
    """Value reached; null where it could not be measured."""
    met: bool
    """Whether the target is met."""


class Evaluation(_Event):
    """How far the evaluation of the run is, every few seconds."""

    phase: str
    """What is counted, such as `val photos`."""
    done: int
    """Photos that are done."""
    total: int
    """All photos of the phase."""


class Verdict(_Event):
    """The run was evaluated against its targets."""

    met: bool
    """Whether all targets are met."""
    targets: dict[str, Target]
    """Per target: `target`, `value` and `met`."""
    metrics_path: str = ""
    """Path of `metrics.json`."""
    report_path: str = ""
    """Path of `report.html`."""


KINDS: dict[str, type[_Event]] = {
    "run": Run,
    "task": TaskStatus,
    "initial_weights": InitialWeights,
    "step": Step,
    "epoch": Epoch,
    "validation": Validation,
    "checkpoint": Checkpoint,
    "decay": Decay,
    "budget": Budget,
    "quarantine": Quarantine,
    "warning": Warn,
    "failure": Failure,
    "system": System,
    "examples": Examples,
    "evaluation": Evaluation,
    "verdict": Verdict,
}
