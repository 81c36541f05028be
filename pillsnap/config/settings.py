"""Every setting: type, limits, default and meaning. `pillsnap config show` and the documentation read them here."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

TASKS = ("detection", "classification")
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]
CameraField = Literal["state", "background", "direction", "light", "latitude", "longitude", "size"]


class _Settings(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, strict=False, use_attribute_docstrings=True
    )


class SamplingSettings(_Settings):
    """Which photos and classes `manifest build` takes, and how it splits them."""

    num_photos: Count | None = None
    """Photos to take; null: all."""
    num_classes: Count | None = None
    """Classes to take; null: all."""
    combination_fraction: Fraction = 0.05
    """Share of combination photos (two to four pills)."""
    val_fraction: Fraction = 0.185
    """Share of photos in the validation split."""
    min_photos_per_class: Annotated[int, Field(ge=2)] = 2
    """Classes with fewer photos are not taken."""
    group_by: Annotated[tuple[CameraField, ...], Field(min_length=1)] = ("direction", "longitude")
    """Fields of the file name that near-identical photos of one pill share; such photos stay in one split."""
    label_reader: Literal["auto", "ray", "processes"] = "auto"
    """What reads the label files: Ray Data or local processes. `auto`: Ray Data where there is a cluster to join."""
    check_copies: bool = True
    """Read every sampled photo, and leave out validation photos that are byte-identical to a training photo."""
    unknown_classes: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the classes that are left out of training: their photos of one pill are validated as unknown pills."""


class DataSettings(_Settings):
    """How photos are read, decoded and cached."""

    store: Literal["off", "jpeg", "jpeg2x", "png"] = "off"
    """Decode-once store of windows (crops and reduced frames): `jpeg2x` is small and costs no measured accuracy, `jpeg`
    is smaller and blurs crops of large pills, `png` is exact. Filled by `pillsnap prepare`, or during training while
    the disk has room."""
    store_dir: str | None = None
    """Folder or URI of the store; null: `store` in the run directory."""
    decode_in: Literal["auto", "tasks", "workers"] = "auto"
    """Where photos are decoded: in Ray Data tasks on any node, or in processes of the train workers. `auto`: `workers`
    with a store on one machine without a GPU and with at most 4 CPUs, else `tasks`."""
    decoding_processes: Count | None = None
    """Decoding processes per train worker with decode_in `workers`; null: the worker's share of the CPU cores."""
    max_pixels: Count = 64_000_000
    """Photos with more pixels are refused from their header and quarantined."""
    quarantine_fraction: Fraction = 0.01
    """Share of unreadable photos above which the run stops."""
    quarantine_after: Count = 200
    """Photos read from which the share itself counts; before, it must exceed the limit with 99.5 % confidence."""
    batches_per_read: Count = 4
    """Batches per Ray Data task; those for one worker are handed over together."""
    decoding_cpus: Positive = 0.75
    """CPUs reserved per decoding task. Values below 1 let the tasks use what the train workers reserve but leave idle;
    on one node there are never more tasks than cores."""


class DetectionSettings(_Settings):
    """The detector (ultralytics YOLO, one class: pill), its training and its augmentation."""

    model: str = "yolo11m"
    """ultralytics architecture."""
    weights: str = "pretrained"
    """Initial weights: `pretrained` (downloaded by ultralytics), `random`, or a local file."""
    image_size_px: Annotated[int, Field(ge=32, multiple_of=32)] = 640
    """Side of the square input, pixels."""
    epochs: Count = 18
    """Epochs to train."""
    samples_per_epoch: Count | None = None
    """Training photos per epoch; null: all. The next epoch goes on with the photos that have not come yet."""
    combination_share: Fraction | None = None
    """Share of combination photos among the training photos of each epoch; null: as in the data."""
    validation_samples: Count | None = None
    """Photos validated during training, the same ones in every epoch, a stratified sample; null: all. The evaluation
    at the end takes all."""
    validate_every: Count = 1
    """Epochs from one validation to the next; the last epoch is always validated."""
    batch_size: Count = 16
    """Photos per optimizer step over all workers."""
    lr: Positive = 3e-4
    """Peak learning rate; if you scale the batch by k, scale it by sqrt(k)."""
    final_lr_fraction: Fraction = 0.01
    """Learning rate at the end of the decay, as a share of `lr`."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 5e-4
    """AdamW weight decay; not applied to biases and normalisation layers."""
    warmup_epochs: Annotated[float, Field(ge=0.0)] = 1.0
    """Epochs of linear learning-rate warm-up; shorter where the decay of the schedule `wsd` begins before its end."""
    mosaic: Fraction = 1.0
    """Probability that a training frame is a mosaic of four photos."""
    mosaic_group: Count = 8
    """Consecutive photos of a batch from which a mosaic is drawn; no photo is decoded twice."""
    mosaic_off_epochs: Annotated[int, Field(ge=0)] = 4
    """Number of last epochs without mosaic."""
    scale: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.5
    """Largest relative change of scale, in either direction."""
    translate: Fraction = 0.1
    """Largest shift along each axis, as a share of `image_size_px`."""
    rotation_deg: Annotated[float, Field(ge=0.0, le=180.0)] = 0.0
    """Largest rotation in either direction, degrees."""
    flip_horizontal: Fraction = 0.5
    """Probability of a horizontal flip."""
    flip_vertical: Fraction = 0.0
    """Probability of a vertical flip."""
    hue: Fraction = 0.015
    """Largest relative change of hue."""
    saturation: Fraction = 0.7
    """Largest relative change of saturation."""
    brightness: Fraction = 0.4
    """Largest relative change of brightness."""
    box_gain: Positive = 7.5
    """Weight of the box (IoU) loss."""
    cls_gain: Positive = 0.5
    """Weight of the classification loss of the detector."""
    dfl_gain: Positive = 1.5
    """Weight of the distribution focal loss."""
    incomplete_labels: Literal["leave_out", "mask", "keep"] = "leave_out"
    """Training photos with fewer boxes than their name has pills: `leave_out` skips them, `mask` takes no background
    loss from them, `keep` treats them as complete."""


class ClassificationSettings(_Settings):
    """The classifier (timm), its crops, its training and its augmentation."""

    model: str = "tf_efficientnetv2_s"
    """timm architecture."""
    weights: str = "pretrained"
    """Initial weights: `pretrained` (downloaded by timm), `random`, or a local file."""
    input: Literal["crop", "frame"] = "crop"
    """What is classified: crops around the boxes, or whole photos."""
    image_size_px: Annotated[int, Field(ge=32)] = 224
    """Side of the square input, pixels."""
    epochs: Count = 18
    """Epochs to train."""
    samples_per_epoch: Count | None = None
    """Training crops per epoch; null: all. The next epoch goes on with the crops that have not come yet."""
    validation_samples: Count | None = None
    """Crops validated during training, the same ones in every epoch, a sample stratified by class; null: all. The
    evaluation at the end takes all."""
    validate_every: Count = 1
    """Epochs from one validation to the next; the last epoch is always validated."""
    batch_size: Count = 32
    """Crops per optimizer step over all workers."""
    lr: Positive = 3e-4
    """Peak learning rate; if you scale the batch by k, scale it by sqrt(k)."""
    final_lr_fraction: Fraction = 0.01
    """Learning rate at the end of the decay, as a share of `lr`."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.05
    """AdamW weight decay; not applied to biases and normalisation layers."""
    warmup_epochs: Annotated[float, Field(ge=0.0)] = 1.0
    """Epochs of linear learning-rate warm-up; shorter where the decay of the schedule `wsd` begins before its end."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Share of the target probability that is spread over all classes."""
    drop_rate: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.2
    """Dropout before the last layer."""
    crop_margin: Annotated[float, Field(ge=0.0, le=2.0)] = 0.12
    """Context on each side of the box, as a share of its longer side."""
    jitter_center: Fraction = 0.06
    """Largest shift of the crop along each axis, as a share of its side."""
    jitter_scale: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.12
    """Largest change of the crop's side, as a natural logarithm of the factor."""
    rotation_deg: Annotated[float, Field(ge=0.0, le=180.0)] = 180.0
    """Largest rotation in either direction, degrees."""
    hue: Fraction = 0.01
    """Largest relative change of hue."""
    saturation: Fraction = 0.3
    """Largest relative change of saturation."""
    brightness: Fraction = 0.25
    """Largest relative change of brightness."""
    erasing: Fraction = 0.0
    """Share of training crops with an erased rectangle."""
    class_balance: Fraction = 0.0
    """Oversampling of rare classes: 0 keeps the frequencies of the data, 1 shows all classes equally often."""
    mixup: Annotated[float, Field(ge=0.0)] = 0.0
    """Both parameters of the beta distribution of mixup's weights; 0: no mixup."""
    progressive_from_px: Annotated[int, Field(ge=32)] | None = None
    """Crop size of the first epochs; grows in three steps to `image_size_px`, the size of the last third of the epochs;
    null: constant size."""
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Ratio of the learning rates of consecutive layer groups, from the output to the input; 1: one rate for all."""


class TrainSettings(_Settings):
    """Settings of both tasks: hardware, precision, checkpoints, failures."""

    task: Literal["both", "detection", "classification"] = "both"
    """Tasks to train."""
    num_workers: str | int = "auto"
    """Train workers: `auto` (one per GPU, else one), a number, or MIN:MAX (as many as fit, decided at every start)."""
    device: Literal["auto", "gpu", "cpu"] = "auto"
    """`auto`: one GPU per worker if Ray has any, else CPUs. `gpu`: refuse to start without one."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """Learning rate after the warm-up: half a cosine, or constant until a decay (`wsd`), which can begin early and from
    whose beginning a run can be extended to more epochs."""
    decay_share: Annotated[float, Field(gt=0.0, le=0.9)] = 0.2
    """Share of a run's steps that the decay of the schedule `wsd` takes."""
    patience: Count | None = None
    """Validations without a better metric after which the decay begins; null: it begins at its planned step."""
    time_budget_minutes: Positive | None = None
    """Longest time of the run with its evaluation, minutes; the decay begins early enough to end in time. Time between
    two commands does not count. null: no limit."""
    cpus_per_worker: Positive = 0.5
    """CPUs reserved per train worker; the rest decodes."""
    amp: Literal["auto", "bfloat16", "float16", "off"] = "auto"
    """Mixed precision. `auto`: bfloat16 where the hardware supports it. `float16` uses a dynamic loss scale and is for
    GPUs without bfloat16."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile. `auto`: on with a GPU."""
    grad_clip_norm: Positive = 10.0
    """Largest global gradient norm."""
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9998
    """Largest decay per step of the moving average of the weights, which is what is validated and saved as the model.
    0.9998 averages over the last 5,000 steps."""
    ema_warmup_steps: Positive = 5.0
    """Warm-up of the moving average: its decay is 1 - (1 + step / ema_warmup_steps) ** -0.75, up to ema_decay. 5
    averages over 4 % of 3,000 steps or 2 % of 50,000: short compared with the decay of the learning rate."""
    storage: str | None = None
    """Folder or URI (s3://bucket/runs) under which run directories are stored; null: `artifacts`."""
    keep_checkpoints: Count = 2
    """Newest checkpoints kept per task, besides the best one."""
    checkpoint_minutes: Positive = 10.0
    """Longest time between two checkpoints within an epoch, minutes."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Worker failures after which the run fails instead of restarting the workers."""
    hang_timeout_s: Annotated[float, Field(ge=10.0)] = 90.0
    """Seconds that a worker waits for the others, and Ray for a worker's answer, before the workers are restarted."""
    log_every_steps: Count = 10
    """Steps between two `step` events."""
    seed: Annotated[int, Field(ge=0)] = 42
    """Determines the order of samples, the augmentation and random initial weights."""

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
    """Two-stage inference, evaluation and the report."""

    confidence: Fraction = 0.25
    """Detections with a lower score are not classified in the two-stage pipeline."""
    nms_iou: Fraction = 0.7
    """IoU above which non-maximum suppression drops the lower-scored of two detections."""
    batch_size: Count = 16
    """Photos per batch of the evaluation."""
    price_per_hour: Positive | None = None
    """Price of all the hardware per hour, for the report; null: the report has no cost."""
    currency: str = "USD"
    """Currency of `price_per_hour`."""
    rotations: Literal[1, 2, 4] = 1
    """Evenly spaced rotations of each crop over which the classifier's probabilities are averaged."""
    max_wrong: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.01
    """Largest share of wrong ones among the codes that are given, kept with 95 % confidence; other pills are `unsure`.
    """
    known_accepted: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.99
    """Share of the pills of trained classes that are not answered with `unknown`."""


class TargetSettings(_Settings):
    """What the run has to reach."""

    top1: Fraction | None = None
    """Lowest classification top-1 accuracy; null: no target."""
    top5: Fraction | None = None
    """Lowest classification top-5 accuracy; null: no target."""
    map50: Fraction | None = None
    """Lowest detection mAP@0.5; null: no target."""
    total_time_s: Positive | None = None
    """Longest total time, seconds; null: no target."""


class WandbSettings(_Settings):
    """Weights & Biases."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """`auto`: online if there is an API key, else offline."""
    project: str = "pillsnap"
    """Name of the W&B project."""
    upload_checkpoints: bool = True
    """Upload each task's best and last checkpoint as artifacts when the task ends."""


class Settings(_Settings):
    """Everything a run depends on, validated before Ray starts."""

    name: str
    """Name of the run: its directory is `artifacts/<name>` unless --run says otherwise."""
    stage: Annotated[int, Field(ge=1, le=4)] | None = None
    """Scale step, 1 to 4; null: none."""
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
    def _consistent(self) -> Settings:
        workers = self.train.num_workers
        if self.train.schedule == "cosine" and (self.train.patience or self.train.time_budget_minutes):
            raise ValueError("train.patience and train.time_budget_minutes need train.schedule=wsd: set them to null")
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
