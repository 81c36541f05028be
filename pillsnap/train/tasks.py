"""All that differs between detection and classification: samples, recipe, model, loss, validation, export."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from pillsnap.config import ClassificationSettings, DetectionSettings, Settings
from pillsnap.data.augment import CropJitter, FrameJitter
from pillsnap.data.balance import balance_classes
from pillsnap.data.batches import CropRecipe, FrameRecipe
from pillsnap.data.loader import DeviceBatch
from pillsnap.data.samples import TaskSamples, classification_samples, detection_samples
from pillsnap.data.stream import Recipe


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


@dataclass(frozen=True)
class DetectionTask:
    """YOLO with one class: pill."""

    settings: DetectionSettings
    nms_iou: float
    name: str = "detection"
    best_metric: str = "map50_95"

    def samples(self, manifest: pa.Table, found_boxes: dict[str, list] | None = None) -> TaskSamples:
        return detection_samples(manifest, keep_incomplete=self.settings.incomplete_labels != "leave_out")

    def recipe(self, samples: TaskSamples) -> FrameRecipe:
        s = self.settings
        jitter = FrameJitter(
            s.mosaic,
            s.scale,
            s.translate,
            s.rotation_deg,
            s.flip_horizontal,
            s.flip_vertical,
            s.hue,
            s.saturation,
            s.brightness,
        )
        most = max(
            (len(boxes) for table in (samples.train, samples.val) for boxes in table["boxes"].to_pylist()), default=1
        )
        return FrameRecipe(
            s.image_size_px, jitter, s.mosaic_group, s.epochs - s.mosaic_off_epochs, max(most, 1),
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

        if batch.num_valid == 0:  # the end of an epoch left this worker nothing: take part with no weight
            idle = detection_loss(
                model, _unit_range(batch.images[:1]), batch.targets["boxes"][:1], batch.targets["num_boxes"][:1], 0,
                batch.targets["unsure"][:1] if "unsure" in batch.targets else None,
            )  # fmt: skip
            return {name: loss * 0.0 for name, loss in idle.items()}
        marked = [batch.targets["unsure"]] if "unsure" in batch.targets else []
        images, boxes, num_boxes, *unsure = _valid_rows(
            batch, batch.images, batch.targets["boxes"], batch.targets["num_boxes"], *marked
        )
        means = detection_loss(model, _unit_range(images), boxes, num_boxes, batch.epoch, *unsure)
        return {name: mean * batch.num_valid for name, mean in means.items()}

    def validate(self, model: nn.Module, batch: DeviceBatch) -> list[tuple[np.ndarray, np.ndarray]]:
        """Per photo: (found boxes (k, 5) x, y, w, h, score; label boxes (n, 4)) in pixels of the letterboxed frame."""
        from pillsnap.models.detector import detect

        if batch.num_valid == 0:
            return []
        images, boxes, num_boxes = _valid_rows(batch, batch.images, batch.targets["boxes"], batch.targets["num_boxes"])
        found = detect(model, _unit_range(images), nms_iou=self.nms_iou)
        labels, counts = boxes.cpu().numpy(), num_boxes.tolist()
        return [(rows, labels[i, : counts[i]]) for i, rows in enumerate(found)]

    def score(self, facts: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
        from pillsnap.evaluate.metrics import average_precision, match_detections

        hits = [match_detections(labels, found[:, :4]) for found, labels in facts]
        figures = average_precision(hits, [found[:, 4] for found, _ in facts], sum(len(labels) for _, labels in facts))
        return {name: figures[name] or 0.0 for name in ("map50", "map50_95", "precision", "recall")}

    def export(self, model: nn.Module, path: Path, metrics: dict[str, float]) -> None:
        from pillsnap.models.detector import export_for_ultralytics

        export_for_ultralytics(model, path, self.settings.model_dump())


@dataclass(frozen=True)
class ClassificationTask:
    """timm on crops."""

    settings: ClassificationSettings
    codes: tuple[str, ...]
    name: str = "classification"
    best_metric: str = "top1"

    def samples(self, manifest: pa.Table, found_boxes: dict[str, list] | None = None) -> TaskSamples:
        found = classification_samples(manifest, list(self.codes), found_boxes)
        return replace(found, train=balance_classes(found.train, self.settings.class_balance))

    def recipe(self, samples: TaskSamples) -> CropRecipe:
        s = self.settings
        jitter = CropJitter(
            s.jitter_center, s.jitter_scale, s.rotation_deg, s.hue, s.saturation, s.brightness, s.erasing
        )
        return CropRecipe(s.image_size_px, s.crop_margin, jitter, whole_frame=s.input == "frame")

    def build(self) -> nn.Module:
        from pillsnap.models.classifier import build_classifier

        s = self.settings
        return build_classifier(s.model, s.weights, num_classes=len(self.codes), drop_rate=s.drop_rate)

    def losses(self, model: nn.Module, batch: DeviceBatch) -> dict[str, torch.Tensor]:
        from pillsnap.models.classifier import classification_loss, mixed, progressive_size

        s, labels, valid = self.settings, batch.targets["label"], batch.targets["valid"]
        size_px = progressive_size(batch.epoch, s.epochs, s.progressive_from_px, batch.images.shape[1])
        inputs = self._inputs(model, batch.images, size_px)
        if not s.mixup:
            loss = classification_loss(model(inputs), labels, valid, s.label_smoothing)
            return {"cross_entropy": loss}
        inputs, share = mixed(inputs, valid, s.mixup)
        logits = model(inputs)
        own = classification_loss(logits, labels, valid * share, s.label_smoothing)
        other = classification_loss(logits, labels.flip(0), valid * (1 - share), s.label_smoothing)
        return {"cross_entropy": own + other}

    def validate(self, model: nn.Module, batch: DeviceBatch) -> list[tuple[int, float, np.ndarray]]:
        """Per crop: rank of the right class, from 0; its negative log-likelihood; the same at every temperature."""
        from pillsnap.evaluate.calibration import losses_by_temperature

        logits, labels = _valid_rows(batch, self._logits(model, batch.images).float(), batch.targets["label"])
        ranks = (logits > logits.gather(1, labels[:, None])).sum(1, keepdim=True)
        losses = -logits.log_softmax(1).gather(1, labels[:, None])
        # In one piece: each copy to the host waits for the device.
        rows = torch.cat([ranks, losses, losses_by_temperature(logits, labels)], 1).cpu().numpy()
        return [(int(row[0]), float(row[1]), row[2:]) for row in rows]

    def score(self, facts: list[tuple[int, float, np.ndarray]]) -> dict[str, float]:
        from pillsnap.evaluate.calibration import best_temperature

        ranks = np.array([rank for rank, _, _ in facts])
        if not len(ranks):
            return {"top1": 0.0, "top5": 0.0, "loss": 0.0, "temperature": 1.0}
        return {
            "top1": float((ranks == 0).mean()),
            "top5": float((ranks < 5).mean()),
            "loss": float(np.mean([loss for _, loss, _ in facts])),
            "temperature": best_temperature(np.mean([losses for _, _, losses in facts], axis=0)),
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

    def _logits(self, model: nn.Module, images: torch.Tensor) -> torch.Tensor:
        return model(self._inputs(model, images, images.shape[1]))

    def _inputs(self, model: nn.Module, images: torch.Tensor, size_px: int) -> torch.Tensor:
        from pillsnap.models.classifier import input_statistics, normalise, resized

        return resized(normalise(images, *input_statistics(model)), size_px)


def make_task(name: str, settings: Settings, codes: list[str]) -> Task:
    """The task of that name under these settings."""
    if name == "detection":
        return DetectionTask(settings.detection, settings.evaluation.nms_iou)
    assert name == "classification", name
    return ClassificationTask(settings.classification, tuple(codes))


def _unit_range(images: torch.Tensor) -> torch.Tensor:
    return images.permute(0, 3, 1, 2).float() / 255


def _valid_rows(batch: DeviceBatch, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    if batch.num_valid == len(batch.images):
        return tensors
    if (batch.index[: batch.num_valid] >= 0).all() and (batch.index[batch.num_valid :] < 0).all():
        return tuple(tensor[: batch.num_valid] for tensor in tensors)
    # A photo could not be read: only the device knows which, and the host waits for it.
    rows = batch.targets["valid"]
    return tuple(tensor[rows] for tensor in tensors)
