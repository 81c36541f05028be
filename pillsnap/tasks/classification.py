"""The classification task: a timm model that names crops of pills."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from pillsnap.config import ClassificationSettings
from pillsnap.data.augment import CropJitter
from pillsnap.data.loader import DeviceBatch
from pillsnap.data.recipes import CropRecipe
from pillsnap.data.samples import TaskSamples, balance_classes, classification_samples
from pillsnap.tasks.tensors import valid_rows

NO_RANK = 10**6
"""Beyond every class."""


@dataclass(frozen=True)
class ClassificationTask:
    """Implements base.Task on models/classifier.py."""

    settings: ClassificationSettings
    codes: tuple[str, ...]
    name: str = "classification"
    best_metric: str = "top1"

    def samples(self, manifest: pa.Table, found_boxes: dict[str, list] | None = None) -> TaskSamples:
        s = self.settings
        found = classification_samples(manifest, list(self.codes), found_boxes, num_val=s.validation_samples)
        return replace(found, train=balance_classes(found.train, s.class_balance))

    def recipe(self, samples: TaskSamples) -> CropRecipe:
        s = self.settings
        jitter = CropJitter(
            center=s.jitter_center,
            scale=s.jitter_scale,
            rotation_deg=s.rotation_deg,
            hue=s.hue,
            saturation=s.saturation,
            brightness=s.brightness,
            erase=s.erasing,
        )
        return CropRecipe(s.image_size_px, s.crop_margin, jitter, whole_frame=s.input == "frame")

    def build(self, notes: list[str] | None = None) -> nn.Module:
        from pillsnap.models.classifier import build_classifier

        s = self.settings
        return build_classifier(s.model, s.weights, num_classes=len(self.codes), drop_rate=s.drop_rate, notes=notes)

    def input_size_px(self, epoch: int) -> int:
        from pillsnap.models.classifier import progressive_size

        s = self.settings
        return progressive_size(epoch, s.epochs, s.progressive_from_px, s.image_size_px)

    def independent_epochs(self, model: nn.Module) -> int:
        return self.settings.epochs if self.settings.progressive_from_px is None else 0

    def losses(self, model: nn.Module, batch: DeviceBatch) -> dict[str, torch.Tensor]:
        from pillsnap.models.classifier import classification_loss, mixed

        s, labels, valid = self.settings, batch.targets["label"], batch.targets["valid"]
        inputs = self._inputs(model, batch.images, self.input_size_px(batch.epoch))
        if not s.mixup:
            loss = classification_loss(model(inputs), labels, valid, s.label_smoothing)
            return {"cross_entropy": loss}
        inputs, share = mixed(inputs, valid, s.mixup)
        logits = model(inputs)
        own = classification_loss(logits, labels, valid * share, s.label_smoothing)
        other = classification_loss(logits, labels.flip(0), valid * (1 - share), s.label_smoothing)
        return {"cross_entropy": own + other}

    def weigh(
        self, model: nn.Module, parts: list[DeviceBatch], forward: Callable[[DeviceBatch], Any]
    ) -> list[DeviceBatch]:
        return parts  # the loss is a sum over samples

    def forward(self, model: nn.Module, batch: DeviceBatch) -> torch.Tensor:
        return model(self._inputs(model, batch.images, batch.images.shape[1]))

    def validate(self, model: nn.Module, batch: DeviceBatch) -> list[tuple[int, float, np.ndarray]]:
        """Per crop: rank of the label, from 0; its negative log-likelihood; the facts that fit a temperature.

        A class with the label's logit ranks above it. With a logit that is not finite, the rank is NO_RANK.
        """
        from pillsnap.metrics.calibration import temperature_facts

        logits, labels = valid_rows(batch, self.forward(model, batch).float(), batch.targets["label"])
        ranks = (logits >= logits.gather(1, labels[:, None])).sum(1, keepdim=True) - 1
        ranks = torch.where(logits.isfinite().all(1, keepdim=True), ranks, NO_RANK)
        losses = -logits.log_softmax(1).gather(1, labels[:, None])
        # One copy, because each copy to the host is a sync.
        rows = torch.cat([ranks, losses, temperature_facts(logits, labels)], 1).cpu().numpy()
        return [(int(row[0]), float(row[1]), row[2:]) for row in rows]

    def score(self, facts: list[tuple[int, float, np.ndarray]]) -> dict[str, float]:
        from pillsnap.metrics.calibration import best_temperature

        ranks = np.array([rank for rank, _, _ in facts])
        if not len(ranks):
            return {"top1": 0.0, "top5": 0.0, "loss": 0.0, "temperature": 1.0}
        return {
            "top1": float((ranks == 0).mean()),
            "top5": float((ranks < 5).mean()),
            "loss": float(np.mean([loss for _, loss, _ in facts])),
            "temperature": best_temperature(np.stack([row for _, _, row in facts])),
        }

    def export(self, model: nn.Module, path: Path, metrics: dict[str, float]) -> None:
        from pillsnap.models.classifier import export_for_timm

        s = self.settings
        export_for_timm(
            model,
            path,
            model=s.model,
            codes=list(self.codes),
            image_size_px=s.image_size_px,
            crop_margin=s.crop_margin,
            temperature=metrics.get("temperature", 1.0),
        )

    def _inputs(self, model: nn.Module, images: torch.Tensor, size_px: int) -> torch.Tensor:
        from pillsnap.models.classifier import input_statistics, normalise, resized

        return resized(normalise(images, *input_statistics(model)), size_px)
