"""Estimates how long a stage takes on this machine, what limits it, and which models fit its time budget."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from pillsnap.config import TASKS, Settings
from pillsnap.errors import UserError
from pillsnap.models.precision import this_device
from pillsnap.planner.measure import StepRates, measure_loader, measure_steps
from pillsnap.runs.directory import Run
from pillsnap.storage import is_uri

# From fast to accurate. The model of the settings is always measured.
ALTERNATIVES: dict[str, tuple[tuple[str, int], ...]] = {
    "detection": (("yolo11n", 416), ("yolo11n", 640), ("yolo11s", 640), ("yolo11m", 640)),
    "classification": (("resnet18", 160), ("tf_efficientnetv2_b0", 224), ("tf_efficientnetv2_s", 224),
                       ("tf_efficientnetv2_s", 300), ("tf_efficientnetv2_m", 300)),
}  # fmt: skip
START_S = 30.0
"""Start of one task: Ray's workers, imports and the first batch, seconds."""
_PILLS_PER_COMBINATION = 3
_ALL_PHOTOS = 500_000
_CPU_BATCH = 2
_SAMPLE_PHOTOS, _SAMPLE_CLASSES = 48, 12


@dataclass(frozen=True)
class Counts:
    """Samples of one task."""

    train: int
    val: int


@dataclass(frozen=True)
class TaskEstimate:
    """One task with one model: measured rates, and the times that follow from them."""

    task: str
    model: str
    image_size_px: int
    epochs: int
    counts: Counts
    steps: StepRates
    loader_images_per_s: float

    @property
    def epoch_s(self) -> float:
        """Seconds per epoch with its validation: each takes the slower of the rates of model and loader."""
        train = self.counts.train / min(self.steps.train_images_per_s, self.loader_images_per_s)
        return train + self.counts.val / min(self.steps.val_images_per_s, self.loader_images_per_s)

    @property
    def seconds(self) -> float:
        """Seconds of the whole task."""
        return START_S + self.steps.first_step_s + self.epochs * self.epoch_s

    @property
    def limit(self) -> str:
        """What limits the training steps: `loader` or `model`."""
        return "loader" if self.loader_images_per_s < self.steps.train_images_per_s else "model"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "task": self.task,
            "model": self.model,
            "image_size_px": self.image_size_px,
            "epochs": self.epochs,
            "num_train": self.counts.train,
            "num_val": self.counts.val,
            "model_images_per_s": self.steps.train_images_per_s,
            "validation_images_per_s": self.steps.val_images_per_s,
            "loader_images_per_s": self.loader_images_per_s,
            "peak_memory_bytes": self.steps.peak_memory_bytes,
            "limit": self.limit,
            "seconds": self.seconds,
        }


def evaluation_s(detection: TaskEstimate | None, classification: TaskEstimate | None, num_photos: int) -> float:
    """Seconds of the evaluation: each of `num_photos` passes the loader and each model once."""
    rates = [task.steps.val_images_per_s for task in (detection, classification) if task is not None]
    loaders = [task.loader_images_per_s for task in (detection, classification) if task is not None]
    return START_S + num_photos * max(sum(1 / rate for rate in rates), 1 / min(loaders))


def epochs_within(tasks: list[TaskEstimate], budget_s: float, fixed_s: float) -> dict[str, int]:
    """Epochs per task that fit `budget_s` when all tasks are scaled by one factor; 0 when nothing fits."""
    fixed_s += sum(START_S + task.steps.first_step_s for task in tasks)
    factor = (budget_s - fixed_s) / sum(task.epochs * task.epoch_s for task in tasks)
    return {task.task: max(0, int(task.epochs * factor)) for task in tasks}


def largest_within(
    choices: dict[str, list[TaskEstimate]], budget_s: float, evaluating_s: Callable[[list[TaskEstimate]], float]
) -> list[TaskEstimate] | None:
    """The last (most accurate) choice per task that fits `budget_s` together with the evaluation, or None.

    Classification has priority over detection, which loses less with a small model.
    """
    names = [name for name in reversed(TASKS) if name in choices]

    for combination in itertools.product(*(reversed(choices[name]) for name in names)):
        tasks = sorted(combination, key=lambda task: TASKS.index(task.task))
        if sum(task.seconds for task in tasks) + evaluating_s(tasks) <= budget_s:
            return tasks
    return None


def expected_counts(settings: Settings) -> dict[str, Counts]:
    """Samples per task of a manifest that is yet to be built from these settings."""
    sampling = settings.sampling
    photos = sampling.num_photos or _ALL_PHOTOS
    crops = round(photos * (1 + (_PILLS_PER_COMBINATION - 1) * sampling.combination_fraction))
    counts = {}
    for name, number in (("detection", photos), ("classification", crops)):
        val = round(number * sampling.val_fraction)
        counts[name] = Counts(number - val, val)
    return counts


def sample_run(settings: Settings, folder: Path) -> Run:
    """A run over a few generated photos of AI Hub's size, to measure the loader without a manifest."""
    from pillsnap.manifest.build import build_manifest
    from pillsnap.manifest.table import read_classes, read_manifest
    from pillsnap.synthetic import generate

    combinations = _SAMPLE_PHOTOS // 8
    generate(
        folder / "photos", num_classes=_SAMPLE_CLASSES, num_singles=_SAMPLE_PHOTOS - combinations,
        num_combinations=combinations,
    )  # fmt: skip
    # Its own store, in that folder.
    settings = settings.model_copy(update={"data": settings.data.model_copy(update={"store_dir": None})})
    path = build_manifest(folder / "photos", folder / "manifest", num_photos=None, num_classes=None).path
    return Run(folder, settings, read_manifest(path), "", read_classes(path.parent), str(folder / "photos"), "plan")


def read_run(settings: Settings, where: str, manifest: Path, data_root: str) -> Run:
    """The run that training would open at `where`, a folder or URI; writes nothing. Raises UserError when the manifest
    cannot be read.
    """
    from pillsnap.manifest.table import manifest_hash, read_classes, read_manifest

    classes = read_classes(manifest if manifest.is_dir() else manifest.parent)
    table, uri = read_manifest(manifest), where if is_uri(where) else ""
    return Run(Path(where), settings, table, manifest_hash(manifest), classes, data_root, "plan", uri)


def measure_task_loader(run: Run, name: str, seconds: float, *, read_only: bool) -> float:
    """Samples per second of a task's stream, the same as in training. Ray must be initialised.

    `read_only`: what is missing in the run's store is read from the photos and not added.
    """
    from pillsnap.tasks.registry import make_task
    from pillsnap.train.trainer import make_stream

    task = make_task(name, run.settings, run.codes)
    samples = task.samples(run.manifest, None)
    wanted = 64 * task.settings.batch_size
    # Small manifests are repeated, so that the measurement does not run out of batches.
    copies = -(-wanted // max(len(samples.train), 1))
    many = pa.concat_tables([samples.train] * copies) if copies > 1 else samples.train
    stream = make_stream(run, name, type(samples)(many, samples.val, {}), task.recipe(samples), read_only=read_only)
    return measure_loader(stream, seconds, run.settings.data, run.settings.train.cpus_per_worker)


def measure_choice(
    settings: Settings, codes: list[str], name: str, model: str, image_size_px: int, seconds: float
) -> StepRates:
    """Rates of a task with another model and input size, from random weights."""
    from pillsnap.tasks.registry import make_task

    update = {"model": model, "image_size_px": image_size_px, "weights": "random"}
    task_settings = getattr(settings, name).model_copy(update=update)
    task = make_task(name, settings.model_copy(update={name: task_settings}), codes)
    device = this_device(settings.train.device)
    batch_size = task_settings.batch_size if device.type == "cuda" else min(task_settings.batch_size, _CPU_BATCH)
    return measure_steps(
        task, settings.train, device, batch_size=batch_size, seconds=seconds, num_classes=max(len(codes), 1)
    )


def estimate(
    settings: Settings, run: Run | None, *, seconds: float, alternatives: bool, say: Callable[[str], None]
) -> dict[str, Any]:
    """Measure and compute everything that `pillsnap plan` prints. Ray must be initialised.

    `run`: the manifest to plan for; None: counts come from the settings and photos are generated. Each measurement
    takes about `seconds`.
    """
    budget_s = settings.targets.total_time_s
    device = this_device(settings.train.device)
    with tempfile.TemporaryDirectory(prefix="pillsnap-plan-") as folder:
        measured = run
        if measured is None:
            say("there is no manifest: measuring on generated photos")
            measured = sample_run(settings, Path(folder))
        counts = expected_counts(settings) if run is None else _counts(run)
        num_classes = (settings.sampling.num_classes or 4_500) if run is None else len(run.codes)
        loaders = {}
        for name in settings.tasks:
            say(f"{name}: measuring the loader")
            loaders[name] = measure_task_loader(measured, name, seconds, read_only=run is not None)
    codes = [f"K-{number:06}" for number in range(num_classes)]
    choices: dict[str, list[TaskEstimate]] = {}
    chosen: list[TaskEstimate] = []
    for name in settings.tasks:
        own = (getattr(settings, name).model, getattr(settings, name).image_size_px)
        models = [
            *(ALTERNATIVES[name] if alternatives else ()),
            *([] if alternatives and own in ALTERNATIVES[name] else [own]),
        ]
        for model, image_size_px in models:
            say(f"{name}: measuring {model} at {image_size_px} px")
            try:
                steps = measure_choice(settings, codes, name, model, image_size_px, seconds)
            except UserError as error:
                say(f"{name}: {model} at {image_size_px} px cannot be measured: {error}")
                continue
            task = TaskEstimate(
                name, model, image_size_px, getattr(settings, name).epochs, counts[name], steps, loaders[name]
            )
            choices.setdefault(name, []).append(task)
            if (model, image_size_px) == own:
                chosen.append(task)
    num_val = counts["detection"].val

    def evaluating_s(tasks: list[TaskEstimate]) -> float:
        by_task = {task.task: task for task in tasks}
        return evaluation_s(by_task.get("detection"), by_task.get("classification"), num_val)

    after_training_s = evaluating_s(chosen)
    total_s = sum(task.seconds for task in chosen) + after_training_s
    fitting = largest_within(choices, budget_s, evaluating_s) if budget_s else None
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "from_manifest": run is not None,
        "tasks": [task.to_dict() for task in chosen],
        "judgement_s": after_training_s,
        "total_s": total_s,
        "budget_s": budget_s,
        "fits": None if budget_s is None else total_s <= budget_s,
        "epochs_within_budget": epochs_within(chosen, budget_s, after_training_s) if budget_s else None,
        "alternatives": [task.to_dict() for tasks in choices.values() for task in tasks] if alternatives else [],
        "largest_within_budget": [task.to_dict() for task in fitting] if fitting else None,
    }


def _counts(run: Run) -> dict[str, Counts]:
    from pillsnap.tasks.registry import make_task

    counts = {}
    for name in TASKS:
        samples = make_task(name, run.settings, run.codes).samples(run.manifest, None)
        counts[name] = Counts(len(samples.train), len(samples.val))
    return counts
