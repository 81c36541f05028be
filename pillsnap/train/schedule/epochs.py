"""Settings and samples of a task -> the plan of its epochs."""

from __future__ import annotations

from dataclasses import replace

from pillsnap.config import ClassificationSettings, DetectionSettings
from pillsnap.data.plan import StreamPlan
from pillsnap.data.samples import TaskSamples


def stream_plan(
    task: DetectionSettings | ClassificationSettings, seed: int, samples: TaskSamples, num_workers: int = 1
) -> StreamPlan:
    """The plan of a task. Combinations are drawn apart where `samples` has them apart, and other samples as well."""
    plan = StreamPlan(
        seed=seed,
        epochs=task.epochs,
        num_train=len(samples.train),
        num_val=len(samples.val),
        batch_size=task.batch_size,
        num_workers=num_workers,
        samples_per_epoch=task.samples_per_epoch,
        validate_every=task.validate_every,
    )
    share = getattr(task, "combination_share", None)
    if share is None or not 0 < samples.num_combinations < plan.num_train:
        return plan
    in_epoch = round(share * plan.epoch_samples)
    return replace(plan, num_combinations=samples.num_combinations, combinations_per_epoch=in_epoch)


def notes(name: str, task: DetectionSettings | ClassificationSettings, samples: TaskSamples) -> list[str]:
    """Settings of the epochs that have no effect on these samples, one line each."""
    share = getattr(task, "combination_share", None)
    if share is None or 0 < samples.num_combinations < len(samples.train):
        return []
    kind = "combination" if not samples.num_combinations else "single"
    return [f"{name}.combination_share {share} has no effect: there is no complete {kind} photo to train on."]
