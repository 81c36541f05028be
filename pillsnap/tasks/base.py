"""The Task protocol: everything the stream, the loop and the evaluation need to know about a task."""

from __future__ import annotations

from collections.abc import Callable
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
    """Contract of a task; registry.py lists the implementations."""

    @property
    def name(self) -> str: ...

    @property
    def best_metric(self) -> str:
        """Key of the `score` that selects the best checkpoint; higher is better."""
        ...

    @property
    def settings(self) -> DetectionSettings | ClassificationSettings: ...

    def samples(self, manifest: pa.Table, found_boxes: dict[str, list] | None) -> TaskSamples:
        """Training and validation samples. `found_boxes` are detector boxes of unlabelled pills by sample id."""
        ...

    def recipe(self, samples: TaskSamples) -> Recipe:
        """How a sample becomes an image and its targets."""
        ...

    def build(self, notes: list[str] | None = None) -> nn.Module:
        """A new model with its initial weights. `notes` gets a line about weights that fit in part."""
        ...

    def input_size_px(self, epoch: int) -> int:
        """Side of the model's square input in training in an epoch, from 0. A new size compiles the model again."""
        ...

    def independent_epochs(self, model: nn.Module) -> int:
        """The first epochs in which neither samples nor `model` depend on the number of epochs."""
        ...

    def losses(self, model: nn.Module, batch: DeviceBatch) -> dict[str, torch.Tensor]:
        """Losses by name, each a sum over the batch's valid samples; () tensors."""
        ...

    def weigh(
        self, model: nn.Module, parts: list[DeviceBatch], forward: Callable[[DeviceBatch], Any]
    ) -> list[DeviceBatch]:
        """The parts of a batch such that their `losses` add up to those of the batch. `forward` computes the losses of
        a part, without a trace.
        """
        ...

    def forward(self, model: nn.Module, batch: DeviceBatch) -> Any:
        """Outputs of `model` for a batch as it is validated."""
        ...

    def validate(self, model: nn.Module, batch: DeviceBatch) -> list[Any]:
        """Validation facts, one per valid sample, on the host."""
        ...

    def score(self, facts: list[Any]) -> dict[str, float]:
        """Metrics from the facts of all validation samples."""
        ...

    def export(self, model: nn.Module, path: Path, metrics: dict[str, float]) -> None:
        """Write the model for its own framework; `metrics` are its `score`."""
        ...
