"""The two trained models chained: photo -> boxes -> crops from the original pixels -> codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from pillsnap.config import Settings
from pillsnap.data import augment
from pillsnap.data.batches import NO_CROP_JITTER
from pillsnap.errors import UserError
from pillsnap.train.best import load_best
from pillsnap.train.state import autocast


@dataclass(frozen=True)
class Detections:
    """Found boxes of one photo, best first: `boxes` (k, 4) x, y, w, h in pixels of the photo, `scores` (k,) 0 to 1."""

    boxes: np.ndarray
    scores: np.ndarray


class TwoStage:
    """The best detector and classifier of a run, on one device. Either may be missing."""

    def __init__(self, run_dir: Path, settings: Settings, codes: list[str], *, classify: bool = True) -> None:
        self._settings = settings
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._autocast = autocast(settings.train.amp, self._device)
        self._rng = np.random.default_rng(0)
        self._num_classes = len(codes)
        self.detector = self._load(run_dir, "detection", codes)
        self.classifier = self._load(run_dir, "classification", codes) if classify else None
        if self.detector is None and self.classifier is None:
            raise UserError(
                f"{run_dir} has no complete checkpoint: train it first, with `pillsnap train --run {run_dir}`."
            )

    @torch.inference_mode()
    def detect(self, photos: Sequence[np.ndarray]) -> list[Detections]:
        """Boxes of photos of any size, (height, width, 3) uint8 RGB each."""
        from pillsnap.models.detector import detect

        assert self.detector is not None
        size_px = self._settings.detection.image_size_px
        frames = np.stack([augment.letterbox(photo, size_px) for photo in photos])
        images = torch.from_numpy(frames).to(self._device).permute(0, 3, 1, 2).float() / 255
        with self._autocast():
            found = detect(self.detector, images, nms_iou=self._settings.evaluation.nms_iou)
        return [_in_photo(rows, photo, size_px) for rows, photo in zip(found, photos, strict=True)]

    @torch.inference_mode()
    def classify(self, photos: Sequence[np.ndarray], boxes: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Class probabilities, (k, classes) for the k boxes (k, 4) of each photo; the crops come from the photo's own
        pixels.
        """
        from pillsnap.models.classifier import input_statistics, normalise

        assert self.classifier is not None
        settings = self._settings.classification
        crops = [self._crop(photo, box) for photo, rows in zip(photos, boxes, strict=True) for box in rows]
        probabilities = [np.zeros((0, self._num_classes), np.float32)]
        for start in range(0, len(crops), settings.batch_size):
            images = torch.from_numpy(np.stack(crops[start : start + settings.batch_size])).to(self._device)
            with self._autocast():
                logits = self.classifier(normalise(images, *input_statistics(self.classifier)))
            probabilities.append(logits.float().softmax(1).cpu().numpy())
        return np.split(np.concatenate(probabilities), np.cumsum([len(rows) for rows in boxes])[:-1])

    def _crop(self, photo: np.ndarray, box: np.ndarray) -> np.ndarray:
        settings = self._settings.classification
        if settings.input == "frame":
            return augment.crop(
                photo,
                np.array([0, 0, photo.shape[1], photo.shape[0]]),
                settings.image_size_px,
                0.0,
                NO_CROP_JITTER,
                self._rng,
            )
        return augment.crop(photo, box, settings.image_size_px, settings.crop_margin, NO_CROP_JITTER, self._rng)

    def _load(self, run_dir: Path, name: str, codes: list[str]) -> nn.Module | None:
        best = load_best(run_dir, name, self._settings, codes)
        return None if best is None else best[1].to(self._device).to(memory_format=torch.channels_last)


def _in_photo(rows: np.ndarray, photo: np.ndarray, size_px: int) -> Detections:
    height, width = photo.shape[:2]
    back = np.linalg.inv(augment.letterbox_matrix(width, height, size_px))
    boxes = augment.transform_boxes(rows[:, :4], back)
    low = np.clip(boxes[:, :2], 0, (width, height))
    high = np.clip(boxes[:, :2] + boxes[:, 2:], 0, (width, height))
    return Detections(np.concatenate([low, high - low], axis=1).astype(np.float32), rows[:, 4])
