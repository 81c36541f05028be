"""From rates to times: how long each part of a task takes, what limits it, and what fits a time budget."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pillsnap.config import TASKS, ClassificationSettings, DetectionSettings
from pillsnap.evaluate.answers import MAX_FITTED
from pillsnap.planner.measure import LoaderRates, StepRates

START_S = 30.0
"""Start of one task: Ray's workers, imports and the first batch, seconds."""


@dataclass(frozen=True)
class Counts:
    """Samples of one task in its data."""

    train: int
    val: int
    train_combinations: int = 0
    """Those of `train` that are combination photos or crops of them."""
    stored: float = 0.0
    """Share of the samples whose windows are already in the decode-once store."""


@dataclass(frozen=True)
class Passes:
    """Samples that a task's training sees, repetitions counted."""

    train: float
    train_new: float
    """Those whose windows have to be made from photos."""
    val: float
    val_new: float
    epochs: int

    @classmethod
    def of(cls, settings: DetectionSettings | ClassificationSettings, counts: Counts) -> Passes:
        """What the settings make of the data."""
        train = settings.epochs * (settings.samples_per_epoch or counts.train)
        share = getattr(settings, "combination_share", None)
        if share is None:
            seen: float = min(train, counts.train)
        else:  # combinations repeat sooner, and fewer single photos are ever seen
            singles = counts.train - counts.train_combinations
            seen = min(train * share, counts.train_combinations) + min(train * (1 - share), singles)
        validated = min(settings.validation_samples or counts.val, counts.val)
        validations = -(-settings.epochs // settings.validate_every)
        missing = 1 - counts.stored
        return cls(train, seen * missing, validations * validated, validated * missing, settings.epochs)


@dataclass(frozen=True)
class TaskEstimate:
    """One task with one model: measured rates, and the times that follow from them."""

    task: str
    model: str
    image_size_px: int
    counts: Counts
    passes: Passes
    steps: StepRates
    loader: LoaderRates

    @property
    def parts_s(self) -> dict[str, float]:
        """Seconds of the task by part. Each sample takes the slower of model and loader; what the loader adds in
        training is `waiting`.
        """
        p, train_rate, val_rate = self.passes, self.steps.train_images_per_s, self.steps.val_images_per_s
        train_s = p.train / train_rate
        with_loader_s = self._seconds(p.train, p.train_new, train_rate)
        return {
            "start": START_S,
            "compile": self.steps.first_step_s,
            "training": train_s,
            "waiting": max(0.0, with_loader_s - train_s),
            "validation": self._seconds(p.val, p.val_new, val_rate),
        }

    def _seconds(self, samples: float, new: float, model_rate: float) -> float:
        return new / min(model_rate, self.loader.direct) + (samples - new) / min(model_rate, self.loader.stored)

    @property
    def seconds(self) -> float:
        """Seconds of the whole task."""
        return sum(self.parts_s.values())

    @property
    def fixed_s(self) -> float:
        """Seconds that do not depend on the number of epochs."""
        return START_S + self.steps.first_step_s

    @property
    def loader_images_per_s(self) -> float:
        """Mean rate of the loader over the training."""
        p = self.passes
        return p.train / (p.train_new / self.loader.direct + (p.train - p.train_new) / self.loader.stored)

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
            "epochs": self.passes.epochs,
            "num_train": self.counts.train,
            "num_val": self.counts.val,
            "num_train_seen": round(self.passes.train),
            "num_val_seen": round(self.passes.val),
            "num_windows_to_make": round(self.passes.train_new + self.passes.val_new),
            "model_images_per_s": self.steps.train_images_per_s,
            "validation_images_per_s": self.steps.val_images_per_s,
            "loader_images_per_s": self.loader_images_per_s,
            "loader_direct_images_per_s": self.loader.direct,
            "loader_stored_images_per_s": self.loader.stored,
            "peak_memory_bytes": self.steps.peak_memory_bytes,
            "limit": self.limit,
            "parts_s": self.parts_s,
            "seconds": self.seconds,
        }


def evaluation_s(tasks: list[TaskEstimate]) -> float:
    """Seconds of the evaluation: all validation photos, and the training photos to which the classifier's likeness is
    fitted, are decoded and pass the models, each its own samples.
    """
    samples = [
        task.counts.val + (min(MAX_FITTED, task.counts.train) if task.task == "classification" else 0) for task in tasks
    ]
    models_s = sum(number / task.steps.val_images_per_s for number, task in zip(samples, tasks, strict=True))
    decoding_s = max(number / task.loader.direct for number, task in zip(samples, tasks, strict=True))
    return START_S + max(models_s, decoding_s)


def total_s(tasks: list[TaskEstimate]) -> float:
    """Seconds of the tasks with their evaluation."""
    return sum(task.seconds for task in tasks) + evaluation_s(tasks)


def epochs_within(tasks: list[TaskEstimate], budget_s: float) -> dict[str, int]:
    """Epochs per task that fit `budget_s` when all tasks are scaled by one factor; 0 when nothing fits."""
    fixed_s = evaluation_s(tasks) + sum(task.fixed_s for task in tasks)
    factor = (budget_s - fixed_s) / sum(task.seconds - task.fixed_s for task in tasks)
    return {task.task: max(0, int(task.passes.epochs * factor)) for task in tasks}


def largest_within(
    choices: dict[str, list[TaskEstimate]], budget_s: float, total: Callable[[list[TaskEstimate]], float] = total_s
) -> list[TaskEstimate] | None:
    """The last (most accurate) choice per task that fits `budget_s` together with the evaluation, or None.

    Classification has priority over detection, which loses less with a small model.
    """
    names = [name for name in reversed(TASKS) if name in choices]
    for combination in itertools.product(*(reversed(choices[name]) for name in names)):
        tasks = sorted(combination, key=lambda task: TASKS.index(task.task))
        if total(tasks) <= budget_s:
            return tasks
    return None
