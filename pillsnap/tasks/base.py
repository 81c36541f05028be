"""All that differs between detection and classification: samples, recipe, model, loss, validation, export."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import torch
from torch import nn

from pillsnap.config import ClassificationSettings, DetectionSettings
from pillsnap.data.loader import DeviceBatch
from pillsnap.data.recipes import Recipe
from pillsnap.data.samples import TaskSamples


class Task(Protocol):
    """What the training loop needs to know of a task. Losses are sums over a worker's valid samples."""

    @property
    def name(self) -> str: ...

    @property
    def best_metric(self) -> str: ...

    @property
    def settings(self) -> DetectionSettings | ClassificationSettings: ...

    def samples(self, manifest: pa.Table, found_boxes: dict[str, list] | None) -> TaskSamples: ...

    def recipe(self, samples: TaskSamples) -> Recipe: ...

    def build(self) -> nn.Module: ...

    def losses(self, model: nn.Module, batch: DeviceBatch) -> dict[str, torch.Tensor]: ...

    def validate(self, model: nn.Module, batch: DeviceBatch) -> list[Any]:
        """Host-side facts, one a valid sample, from which `score` makes the figures."""
        ...

    def score(self, facts: list[Any]) -> dict[str, float]: ...

    def export(self, model: nn.Module, path: Path, metrics: dict[str, float]) -> None:
        """Write the model for its own framework; `metrics` are what `score` gave for it."""
        ...
