"""Names of tasks (config.TASKS) -> tasks."""

from __future__ import annotations

from pillsnap.config import Settings
from pillsnap.tasks.base import Task
from pillsnap.tasks.classification import ClassificationTask
from pillsnap.tasks.detection import DetectionTask


def make_task(name: str, settings: Settings, codes: list[str], *, untrained: bool = False) -> Task:
    """The task `name` with these settings and class codes. `untrained`: it builds its model with random weights, for
    those of a checkpoint.
    """
    if untrained:
        random = getattr(settings, name).model_copy(update={"weights": "random"})
        settings = settings.model_copy(update={name: random})
    if name == "detection":
        return DetectionTask(settings.detection, settings.evaluation.nms_iou)
    assert name == "classification", name
    return ClassificationTask(settings.classification, tuple(codes))
