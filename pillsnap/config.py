"""Typed, frozen settings: presets, `--set` overrides and flags are read here and nowhere else."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pillsnap.errors import UserError
from pillsnap.storage import check_uri, folder_of, is_uri, join, plain

TASKS = ("detection", "classification")
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]
CameraField = Literal["state", "background", "direction", "light", "latitude", "longitude", "size"]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=False)


class SamplingSettings(_Settings):
    """How many photos and classes `manifest build` takes; None takes all there are."""

    num_photos: Count | None = None
    num_classes: Count | None = None
    combination_fraction: Fraction = 0.05
    val_fraction: Fraction = 0.185
    min_photos_per_class: Annotated[int, Field(ge=2)] = 2
    group_by: Annotated[tuple[CameraField, ...], Field(min_length=1)] = ("direction", "longitude")
    """Fields of the file name that near-twins of one pill share: they stay on one side of the split."""
    label_reader: Literal["auto", "ray", "processes"] = "auto"
    """What reads the label files: `auto` takes Ray Data where there is a cluster to join, else processes."""
    check_copies: bool = True
    """Open every sampled photo, and leave out validation photos that have the bytes of a training photo."""


class DataSettings(_Settings):
    """How photos are read, decoded and kept."""

    store: Literal["off", "jpeg", "png"] = "off"
    """Decode-once store of windows: `jpeg` small and lossy, `png` exact. `pillsnap prepare` fills it, and so does
    training in passing."""
    store_dir: str | None = None
    """Where stores are kept [default: `store` in the run directory]."""
    decode_in: Literal["auto", "tasks", "workers"] = "auto"
    """Where windows are decoded: by Ray Data, on any node, or by processes of the train workers. `auto`: by the workers
    with a store on one machine without a GPU and with up to 4 CPUs, else by Ray Data."""
    decoding_processes: Count | None = None
    """Processes a worker decodes with, when it does [default: its share of the machine's cores]."""

    max_pixels: Count = 64_000_000
    quarantine_fraction: Fraction = 0.01
    """Share of unreadable photos above which a run stops, once `quarantine_after` photos were seen."""
    quarantine_after: Count = 200
    batches_per_read: Count = 4
    """Batches that are made one after the other by the same process; those for one worker are handed over together,
    which costs Ray as much as one."""
    decoding_cpus: Positive = 0.75
    """CPUs one decoding process reserves. Less than one: they use what the train workers reserve and leave. On one node
    there are never more of them than cores; on several, another has the core of a task that ended."""


class DetectionSettings(_Settings):
    """The detector (ultralytics YOLO, one class: pill)."""

    model: str = "yolo11m"
    weights: str = "pretrained"
    """`pretrained` (ultralytics' hub), `random`, or a local file."""
    image_size_px: Annotated[int, Field(ge=32, multiple_of=32)] = 640
    epochs: Count = 18
    batch_size: Count = 16
    """Photos per optimizer step over all workers."""
    lr: Positive = 3e-4
    final_lr_fraction: Fraction = 0.01
    weight_decay: Annotated[float, Field(ge=0.0)] = 5e-4
    warmup_epochs: Annotated[float, Field(ge=0.0)] = 1.0
    mosaic: Fraction = 1.0
    mosaic_group: Count = 8
    """Photos that may meet in one mosaic: neighbours in the epoch's order, so that no photo is decoded twice."""
    mosaic_off_epochs: Annotated[int, Field(ge=0)] = 4
    """Last epochs without mosaic."""
    scale: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.5
    translate: Fraction = 0.1
    rotation_deg: Annotated[float, Field(ge=0.0, le=180.0)] = 0.0
    flip_horizontal: Fraction = 0.5
    flip_vertical: Fraction = 0.0
    hue: Fraction = 0.015
    saturation: Fraction = 0.7
    brightness: Fraction = 0.4
    box_gain: Positive = 7.5
    cls_gain: Positive = 0.5
    dfl_gain: Positive = 1.5
    incomplete_labels: Literal["leave_out", "mask", "keep"] = "leave_out"
    """What happens in training to photos whose name promises more pills than have boxes. `mask`: their boxes teach what
    a pill is, and nothing on them what is none."""


class ClassificationSettings(_Settings):
    """The classifier (timm) and the crops it sees."""

    model: str = "tf_efficientnetv2_s"
    weights: str = "pretrained"
    """`pretrained` (timm's hub), `random`, or a local file."""
    input: Literal["crop", "frame"] = "crop"
    image_size_px: Annotated[int, Field(ge=32)] = 224
    epochs: Count = 18
    batch_size: Count = 32
    """Crops per optimizer step over all workers."""
    lr: Positive = 3e-4
    final_lr_fraction: Fraction = 0.01
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.05
    warmup_epochs: Annotated[float, Field(ge=0.0)] = 1.0
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    drop_rate: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.2
    crop_margin: Annotated[float, Field(ge=0.0, le=2.0)] = 0.12
    """Context around the box on each side, as a share of its longer side."""
    jitter_center: Fraction = 0.06
    jitter_scale: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.12
    rotation_deg: Annotated[float, Field(ge=0.0, le=180.0)] = 180.0
    hue: Fraction = 0.01
    saturation: Fraction = 0.3
    brightness: Fraction = 0.25
    erasing: Fraction = 0.0
    """Share of training crops in which a rectangle is hidden."""
    class_balance: Fraction = 0.0
    """How far rare classes are shown more often: 0 as they come, 1 all classes equally often."""
    mixup: Annotated[float, Field(ge=0.0)] = 0.0
    """Both parameters of the beta distribution that two mixed crops' shares are drawn from; 0 mixes none."""
    progressive_from_px: Annotated[int, Field(ge=32)] | None = None
    """Crop size of the first epoch; it grows to image_size_px over two thirds of the epochs."""
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Learning rate of each group of layers as a share of that of the next one towards the output."""


class TrainSettings(_Settings):
    """What both tasks share."""

    task: Literal["both", "detection", "classification"] = "both"
    num_workers: str | int = "auto"
    """`auto` (one per GPU, one without), a number, or MIN:MAX: as many as there is room for, anew at every start."""
    device: Literal["auto", "gpu", "cpu"] = "auto"
    """`auto`: a GPU a worker where Ray has any, else CPUs; `gpu` refuses to begin without one."""
    cpus_per_worker: Positive = 0.5
    """CPUs a train worker reserves; the rest decodes."""
    amp: Literal["auto", "bfloat16", "float16", "off"] = "auto"
    """`auto`: bfloat16 where the hardware computes it (a GPU, or a CPU with native bfloat16). `float16`, with a loss
    scale that finds itself, is for GPUs that lack it."""
    compile: Literal["auto", "on", "off"] = "auto"
    """`auto`: torch.compile on a GPU."""
    grad_clip_norm: Positive = 10.0
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9998
    ema_warmup_steps: Positive = 10.0
    """Scale on which the moving average lengthens: its decay is 1 - (1 + step / this) ** -0.75, up to ema_decay."""
    storage: str | None = None
    """Where runs are kept [default: artifacts]: a folder, or a URI such as s3://bucket/runs."""
    keep_checkpoints: Count = 2
    checkpoint_minutes: Positive = 10.0
    """Longest time between two checkpoints within an epoch."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Times a dead worker is replaced before the run fails."""
    hang_timeout_s: Annotated[float, Field(ge=10.0)] = 90.0
    """Longest time that a worker waits for another, and that Ray waits for a worker's answer, before the workers are
    started again."""
    log_every_steps: Count = 10
    seed: Annotated[int, Field(ge=0)] = 42

    @field_validator("num_workers")
    @classmethod
    def _workers(cls, value: str | int) -> str | int:
        if value == "auto":
            return value
        least, _, most = str(value).partition(":")
        if not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", str(value)) or (most and int(most) < int(least)):
            raise ValueError("must be 'auto', a number from 1, or MIN:MAX such as 1:4")
        return str(value) if most else int(value)


class EvaluationSettings(_Settings):
    """Two-stage inference and its judging."""

    confidence: Fraction = 0.25
    """Detections below this score are not named in the two-stage pipeline."""
    nms_iou: Fraction = 0.7
    batch_size: Count = 16
    price_per_hour: Positive | None = None
    """What an hour of all the hardware costs, for the report."""
    currency: str = "USD"
    rotations: Literal[1, 2, 4] = 1
    """Turns of each crop, by equal parts of a circle, over which the classifier's answers are averaged."""


class TargetSettings(_Settings):
    """What the run has to reach; None means no target."""

    top1: Fraction | None = None
    map50: Fraction | None = None
    total_time_s: Positive | None = None


class WandbSettings(_Settings):
    """Weights & Biases; `auto` is online with a key and offline without."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str = "pillsnap"
    upload_checkpoints: bool = True
    """Whether a task's best and last checkpoint become artifacts when it ends."""


class Settings(_Settings):
    """Everything a run depends on, validated before Ray starts."""

    name: str
    stage: Annotated[int, Field(ge=1, le=4)] | None = None
    sampling: SamplingSettings = SamplingSettings()
    data: DataSettings = DataSettings()
    detection: DetectionSettings = DetectionSettings()
    classification: ClassificationSettings = ClassificationSettings()
    train: TrainSettings = TrainSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    targets: TargetSettings = TargetSettings()
    wandb: WandbSettings = WandbSettings()

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", value):
            raise ValueError("must be 1 to 64 letters, digits, '.', '_' or '-'")
        return value

    @model_validator(mode="after")
    def _possible(self) -> Settings:
        workers = self.train.num_workers
        for task in TASKS:
            settings = getattr(self, task)
            if isinstance(workers, int) and settings.batch_size % workers:
                raise ValueError(
                    f"{task}.batch_size {settings.batch_size} cannot be shared by {workers} workers evenly"
                )
            if settings.warmup_epochs > settings.epochs:
                raise ValueError(
                    f"{task}.warmup_epochs {settings.warmup_epochs} is more than its {settings.epochs} epochs"
                )
        return self

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks to train, in order."""
        return TASKS if self.train.task == "both" else (self.train.task,)


def preset_names() -> list[str]:
    """Names of the presets that ship with the package."""
    folder = resources.files("pillsnap") / "presets"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_settings(
    preset: str, overrides: Mapping[str, Any] | None = None, assignments: tuple[str, ...] = ()
) -> Settings:
    """Settings of a preset, with `overrides` (dotted key -> value) and then `key=value` assignments on top.

    Raises UserError, in one line, for an unknown preset, an unknown key, a wrong type or an impossible combination.
    """
    if preset not in preset_names():
        raise UserError(f"There is no preset {preset!r}; choose one of {', '.join(preset_names())}.")
    text = (resources.files("pillsnap") / "presets" / f"{preset}.yaml").read_text(encoding="utf-8")
    values: dict[str, Any] = yaml.safe_load(text)
    for key, value in (overrides or {}).items():
        if value is not None:
            _assign(values, key, value)
    for assignment in assignments:
        key, separator, raw = assignment.partition("=")
        if not separator:
            raise UserError(f"--set {assignment!r} is not of the form key=value, for example classification.lr=1e-4.")
        _assign(values, key.strip(), _parse_scalar(raw))
    return settings_from_dict(values)


def settings_from_dict(values: Mapping[str, Any]) -> Settings:
    """Validate a nested mapping; UserError names the first key that is wrong and what it must be."""
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "settings"
        if first["type"] == "extra_forbidden":
            raise UserError(
                f"There is no setting {key!r}. Settings beside it: {', '.join(_siblings(first['loc']))}."
            ) from None
        message = first["msg"].removeprefix("Value error, ")
        given = "" if isinstance(first["input"], Mapping) else f" (given: {first['input']!r})"
        raise UserError(f"Setting {key}: {message}{given}.") from None


def _parse_scalar(raw: str) -> Any:
    # YAML 1.1 reads 1e-4 as text and off as false; a user who types them means a number and a word.
    if raw.strip().lower() in ("on", "off", "yes", "no"):
        return raw.strip().lower()
    if re.fullmatch(r"\d+:\d+", raw.strip()):  # nor does 1:4 mean 64
        return raw.strip()
    try:
        return float(raw) if re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", raw.strip()) else yaml.safe_load(raw)
    except yaml.YAMLError:
        return raw


def _assign(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    node = values
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise UserError(f"There is no setting {key!r}: {parent!r} is a value, not a group.")
    node[last] = value


def _siblings(location: tuple[int | str, ...]) -> list[str]:
    model: Any = Settings
    for part in location[:-1]:
        model = model.model_fields[str(part)].annotation
    return list(model.model_fields)


def run_location(settings: Settings, run: str | Path | None) -> str:
    """Where a run is kept, a folder or a URI: `run` when it is a URI, else of that name in train.storage.

    Raises UserError when the two disagree.
    """
    storage = plain(settings.train.storage or "").rstrip("/")
    run = None if run is None else plain(str(run))
    if run is not None and is_uri(run):
        check_uri(run)
        if storage and folder_of(run) != storage:
            raise UserError(f"--run {run} does not lie in train.storage {storage}: give one of them.")
        return run.rstrip("/")
    if not storage:
        return str(run_directory(settings, None if run is None else Path(run)))
    name = settings.name if run is None else Path(run).absolute().name
    if is_uri(storage):
        check_uri(storage)
        return join(storage, name)
    return str(Path(storage, name).absolute())


def run_directory(settings: Settings, run: Path | None) -> Path:
    """The run directory: the one asked for, or `artifacts/<name>`."""
    return (run or Path("artifacts") / settings.name).absolute()
