"""The detection task: a YOLO detector with the single class `pill`, on whole frames."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from pillsnap.config import DetectionSettings
from pillsnap.data.augment import FrameJitter
from pillsnap.data.loader import DeviceBatch
from pillsnap.data.recipes import FrameRecipe
from pillsnap.data.samples import TaskSamples, detection_samples
from pillsnap.tasks.tensors import unit_range, valid_rows


@dataclass(frozen=True)
class DetectionTask:
    """Implements base.Task on models/detector.py."""

    settings: DetectionSettings
    nms_iou: float
    name: str = "detection"
    best_metric: str = "map50_95"

    def samples(self, manifest: pa.Table, found_boxes: dict[str, list] | None = None) -> TaskSamples:
        return detection_samples(manifest, keep_incomplete=self.settings.incomplete_labels != "leave_out")

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

    def build(self) -> nn.Module:
        from pillsnap.models.detector import build_detector

        s = self.settings
        return build_detector(
            s.model, s.weights, box_gain=s.box_gain, cls_gain=s.cls_gain, dfl_gain=s.dfl_gain, epochs=s.epochs
        )

    def losses(self, model: nn.Module, batch: DeviceBatch) -> dict[str, torch.Tensor]:
        from pillsnap.models.detector import detection_loss

        if batch.num_valid == 0:  # at the end of an epoch: all workers must run the same backward pass
            losses = detection_loss(
                model, unit_range(batch.images[:1]), batch.targets["boxes"][:1], batch.targets["num_boxes"][:1], 0,
                batch.targets["unsure"][:1] if "unsure" in batch.targets else None,
            )  # fmt: skip
            return {name: loss * 0.0 for name, loss in losses.items()}
        masks = [batch.targets["unsure"]] if "unsure" in batch.targets else []
        images, boxes, num_boxes, *unsure = valid_rows(
            batch, batch.images, batch.targets["boxes"], batch.targets["num_boxes"], *masks
        )
        means = detection_loss(model, unit_range(images), boxes, num_boxes, batch.epoch, *unsure)
        return {name: mean * batch.num_valid for name, mean in means.items()}

    def validate(self, model: nn.Module, batch: DeviceBatch) -> list[tuple[np.ndarray, np.ndarray]]:
        """Per photo: detections (k, 5) as x, y, w, h, score, and label boxes (n, 4), in letterboxed pixels."""
        from pillsnap.models.detector import detect

        if batch.num_valid == 0:
            return []
        images, boxes, num_boxes = valid_rows(batch, batch.images, batch.targets["boxes"], batch.targets["num_boxes"])
        found = detect(model, unit_range(images), nms_iou=self.nms_iou)
        labels, counts = boxes.cpu().numpy(), num_boxes.tolist()
        return [(rows, labels[i, : counts[i]]) for i, rows in enumerate(found)]

    def score(self, facts: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
        from pillsnap.metrics.detection import average_precision, match_detections

        hits = [match_detections(labels, found[:, :4]) for found, labels in facts]
        metrics = average_precision(hits, [found[:, 4] for found, _ in facts], sum(len(labels) for _, labels in facts))
        return {name: metrics[name] or 0.0 for name in ("map50", "map50_95", "precision", "recall")}

    def export(self, model: nn.Module, path: Path, metrics: dict[str, float]) -> None:
        from pillsnap.models.detector import export_for_ultralytics

        export_for_ultralytics(model, path, self.settings.model_dump())
