"""The detection task: a YOLO detector with the single class `pill`, on whole frames."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from pillsnap.config import DetectionSettings
from pillsnap.data.augment import FrameJitter
from pillsnap.data.loader import DeviceBatch
from pillsnap.data.recipes import FrameRecipe
from pillsnap.data.samples import TaskSamples, detection_samples
from pillsnap.tasks.tensors import unit_range


@dataclass(frozen=True)
class DetectionTask:
    """Implements base.Task on models/detector.py."""

    settings: DetectionSettings
    nms_iou: float
    name: str = "detection"
    best_metric: str = "map50_95"

    def samples(self, manifest: pa.Table, found_boxes: dict[str, list] | None = None) -> TaskSamples:
        s = self.settings
        return detection_samples(
            manifest, keep_incomplete=s.incomplete_labels != "leave_out",
            combinations_last=s.combination_share is not None, num_val=s.validation_samples,
        )  # fmt: skip

    def recipe(self, samples: TaskSamples) -> FrameRecipe:
        s = self.settings
        jitter = FrameJitter(
            mosaic=s.mosaic,
            scale=s.scale,
            translate=s.translate,
            rotation_deg=s.rotation_deg,
            flip_horizontal=s.flip_horizontal,
            flip_vertical=s.flip_vertical,
            hue=s.hue,
            saturation=s.saturation,
            brightness=s.brightness,
        )
        max_boxes = max(
            (len(boxes) for table in (samples.train, samples.val) for boxes in table["boxes"].to_pylist()), default=1
        )
        return FrameRecipe(
            s.image_size_px, jitter, s.mosaic_group, s.epochs - s.mosaic_off_epochs, max(max_boxes, 1),
            mark_incomplete=s.incomplete_labels == "mask",
        )  # fmt: skip

    def build(self, notes: list[str] | None = None) -> nn.Module:
        from pillsnap.models.detector import build_detector

        s = self.settings
        return build_detector(
            s.model,
            s.weights,
            box_gain=s.box_gain,
            cls_gain=s.cls_gain,
            dfl_gain=s.dfl_gain,
            epochs=s.epochs,
            notes=notes,
        )

    def input_size_px(self, epoch: int) -> int:
        return self.settings.image_size_px

    def independent_epochs(self, model: nn.Module) -> int:
        from pillsnap.models.detector import is_end_to_end

        s = self.settings
        if is_end_to_end(model):  # its loss moves from many boxes per pill to one over all epochs
            return 0
        return max(0, s.epochs - s.mosaic_off_epochs) if s.mosaic else s.epochs

    def losses(self, model: nn.Module, batch: DeviceBatch) -> dict[str, torch.Tensor]:
        from pillsnap.models.detector import detection_loss

        given = batch.targets
        means = detection_loss(
            model, unit_range(batch.images), given["boxes"], given["num_boxes"], batch.epoch, given.get("unsure"),
            given["valid"], batch.loss_weights,
        )  # fmt: skip
        return means if batch.loss_weights is not None else {n: mean * batch.num_valid for n, mean in means.items()}

    def weigh(
        self, model: nn.Module, parts: list[DeviceBatch], forward: Callable[[DeviceBatch], Any]
    ) -> list[DeviceBatch]:
        """The loss divides by the scores assigned in the whole batch, which a forward pass of each part finds."""
        from pillsnap.models.detector import score_sums

        sums = []
        for part in parts:
            forward(part)
            sums.append(score_sums(model))
        own = torch.stack(sums)
        weights = own.clamp(min=1) / own.sum(0).clamp(min=1) * sum(part.num_valid for part in parts)
        return [replace(part, loss_weights=each) for part, each in zip(parts, weights, strict=True)]

    def forward(self, model: nn.Module, batch: DeviceBatch) -> Any:
        return model(unit_range(batch.images))

    def validate(self, model: nn.Module, batch: DeviceBatch) -> list[tuple[np.ndarray, np.ndarray]]:
        """Per photo: detections (k, 5) as x, y, w, h, score, and label boxes (n, 4), in letterboxed pixels."""
        from pillsnap.models.detector import detect

        if batch.num_valid == 0:
            return []
        found = detect(model, unit_range(batch.images), nms_iou=self.nms_iou)
        labels, counts = batch.targets["boxes"].cpu().numpy(), batch.targets["num_boxes"].tolist()
        rows = batch.targets["valid"].nonzero()[:, 0].tolist()
        return [(found[row], labels[row, : counts[row]]) for row in rows]

    def score(self, facts: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
        from pillsnap.metrics.detection import average_precision, match_detections

        hits = [match_detections(labels, found[:, :4]) for found, labels in facts]
        metrics = average_precision(hits, [found[:, 4] for found, _ in facts], sum(len(labels) for _, labels in facts))
        return {name: metrics[name] or 0.0 for name in ("map50", "map50_95", "precision", "recall")}

    def export(self, model: nn.Module, path: Path, metrics: dict[str, float]) -> None:
        from pillsnap.models.detector import export_for_ultralytics

        export_for_ultralytics(model, path, self.settings.model_dump())
