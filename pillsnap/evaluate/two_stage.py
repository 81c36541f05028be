"""Both trained models chained: photo -> boxes -> crops from the original pixels -> codes."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pillsnap.config import Settings
from pillsnap.data import augment
from pillsnap.data.recipes import NO_CROP_JITTER
from pillsnap.data.windows import Photo, Window, crop_scale, frame_scale
from pillsnap.metrics.boxes import MIN_SCORE
from pillsnap.metrics.evidence import Evidence
from pillsnap.models.precision import autocast, this_device
from pillsnap.photos.decode import Scale
from pillsnap.runs.best_checkpoints import untrained
from pillsnap.runs.enrolled import Enrolled
from pillsnap.tasks.best_model import Best, load_best

TOP = 5
_STRIDE = 32
_CROPS_ON_GPU = 32
"""Crops that a GPU gets at once, always as many: cuDNN plans the convolutions of each new shape, 3 s on an H200, and
the number of pills differs from batch to batch.
"""
_MAX_THREADS = 8
"""In which photos are decoded and crops cut: a GPU waits for that."""
AnyPhoto = Photo | np.ndarray
"""Bytes of a photo, or its pixels (height, width, 3) uint8 RGB."""


@dataclass(frozen=True)
class Detections:
    """Boxes of one photo, best first: `boxes` (k, 4) x, y, w, h in pixels of the photo, `scores` (k,) 0 to 1."""

    boxes: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True)
class Names:
    """Classes of k crops: the `top` five class indices (k, 5), best first, their calibrated probabilities `probs`
    (k, 5), the probability of the best class before calibration, `raw` (k,), the `logits` (k, classes), and the pooled
    `features` (k, d) of which the head computes them.

    `top` and `probs` take the evidence into account; `unaided` (k,) is the best class of the photo alone,
    `unaided_probs` (k,) its calibrated probability, and `forbidden` (k,) that of all classes that are not possible.
    Probabilities are 0 where a logit is not finite.
    """

    top: np.ndarray
    probs: np.ndarray
    raw: np.ndarray
    logits: np.ndarray
    features: np.ndarray
    unaided: np.ndarray
    unaided_probs: np.ndarray
    forbidden: np.ndarray

    def rows(self, chosen: slice) -> Names:
        """Some of the crops."""
        return Names(*(getattr(self, each.name)[chosen] for each in fields(self)))


class TwoStage:
    """The best detector and classifier of a run (a folder or URI) on one device. Either may be None.

    `evidence`: what is known beside the photos. `enrolled`: drugs enrolled after the training, the last of `codes`.
    Raises UserError when they were enrolled with other weights.
    """

    def __init__(
        self,
        run: str | Path,
        settings: Settings,
        codes: list[str],
        *,
        detect: bool = True,
        classify: bool = True,
        evidence: Evidence | None = None,
        enrolled: Enrolled | None = None,
    ) -> None:
        self._settings = settings
        self.device = this_device(settings.train.device)
        self._autocast = autocast(settings.train.amp, self.device)
        self._equal_shapes = self.device.type == "cuda"
        self._rng = np.random.default_rng(0)
        self._threads = ThreadPoolExecutor(min(os.cpu_count() or 1, _MAX_THREADS))
        trained = codes[: len(codes) - len(enrolled.classes)] if enrolled else codes
        detection = load_best(run, "detection", settings, trained) if detect else None
        classification = load_best(run, "classification", settings, trained) if classify else None
        if detection is None and classification is None:
            raise untrained(run)
        self.detector = None if detection is None else self._ready(detection).fuse(verbose=False)
        self.classifier = None if classification is None else self._fused_classifier(classification)
        evidence = evidence or Evidence(np.zeros(len(codes)), len(codes))
        self._log_ratios = torch.from_numpy(evidence.log_ratios).float().to(self.device)
        self._num_named = min(TOP, evidence.num_allowed)
        self._more_rows = None
        if enrolled is not None and classification is not None:
            enrolled.require(classification.weights_sha256, run)
            weight, bias = (torch.from_numpy(rows).to(self.device) for rows in enrolled.padded)
            self._more_rows = weight, bias
        self.weights_sha256 = "" if classification is None else classification.weights_sha256
        self.temperature = 1.0 if classification is None else classification.metrics.get("temperature", 1.0)

    @torch.inference_mode()
    def detect(self, photos: Sequence[AnyPhoto], min_score: float = MIN_SCORE) -> list[Detections]:
        """Boxes with a score of at least `min_score`, of photos of any size."""
        from pillsnap.models.detector import detect

        assert self.detector is not None
        size_px = self._settings.detection.image_size_px
        windows = list(self._threads.map(lambda photo: _decoded(photo, frame_scale(size_px)), photos))
        left, top, right, bottom = _window([window.pixels for window in windows], size_px)

        def frame(window: Window) -> np.ndarray:
            return augment.letterbox(window.pixels, size_px)[top:bottom, left:right]

        frames = np.stack(list(self._threads.map(frame, windows)))
        frames = self._filled(frames, self._settings.evaluation.batch_size)
        images = torch.from_numpy(frames).to(self.device).permute(0, 3, 1, 2).float() / 255
        with self._autocast():
            found = detect(self.detector, images, nms_iou=self._settings.evaluation.nms_iou, min_score=min_score)
        found = found[: len(photos)]
        for rows in found:
            rows[:, :2] += (left, top)
        return [_in_photo(rows, window, size_px) for rows, window in zip(found, windows, strict=True)]

    @torch.inference_mode()
    def classify(self, photos: Sequence[AnyPhoto], boxes: Sequence[np.ndarray]) -> list[Names]:
        """Classes of the k boxes (k, 4) of each photo; crops are cut from the photo's pixels, not from the frame."""
        assert self.classifier is not None
        settings = self._settings.classification
        crops = [crop for of_photo in self._threads.map(self._crops, photos, boxes) for crop in of_photo]
        parts = [self._no_names()]
        at_once = _CROPS_ON_GPU if self._equal_shapes else settings.batch_size
        for start in range(0, len(crops), at_once):
            chunk = crops[start : start + at_once]
            images = torch.from_numpy(self._filled(np.stack(chunk), at_once)).to(self.device)
            logits, features = (each[: len(chunk)] for each in self._logits_and_features(images))
            answered = logits.isfinite().all(1, keepdim=True)
            finite = torch.where(answered, logits, 0)
            calibrated = finite / self.temperature
            aided = calibrated + self._log_ratios
            top = aided.topk(self._num_named).indices  # of logits: small probabilities are all 0
            probs = aided.softmax(1).gather(1, top)
            alone = calibrated.softmax(1)
            unaided_probs, unaided = alone.max(1)
            forbidden = alone[:, self._log_ratios == -math.inf].sum(1)
            raw = finite.softmax(1).amax(1, keepdim=True)
            sure = answered[:, 0]
            named = (top, probs * answered, (raw * answered)[:, 0], logits, features)
            arrays = (*named, unaided, unaided_probs * sure, forbidden)
            parts.append(Names(*(array.cpu().numpy() for array in arrays)))
        names = Names(*(np.concatenate([getattr(part, each.name) for part in parts]) for each in fields(Names)))
        ends = np.cumsum([len(rows) for rows in boxes]).tolist()
        return [names.rows(slice(end - len(rows), end)) for end, rows in zip(ends, boxes, strict=True)]

    def _filled(self, images: np.ndarray, number: int) -> np.ndarray:
        """Images (n, h, w, 3), on a GPU followed by black ones up to `number`."""
        if self._equal_shapes and len(images) < number:
            images = np.pad(images, ((0, number - len(images)), (0, 0), (0, 0), (0, 0)))
        return np.ascontiguousarray(images)

    def _no_names(self) -> Names:
        """Of no box: as wide as those of others."""
        assert self.classifier is not None
        width = getattr(self.classifier, "head_hidden_size", self.classifier.num_features)
        top, logits, features = (np.zeros((0, n), np.float32) for n in (self._num_named, len(self._log_ratios), width))
        indices, each = top.astype(np.int64), top[:, 0]
        return Names(indices, top, each, logits, features, indices[:, 0], each, each)

    @torch.inference_mode()
    def head(self, features: np.ndarray) -> np.ndarray:
        """Logits (k, classes) of the trained classes from features (k, d), in single precision."""
        assert self.classifier is not None
        return self.classifier.get_classifier()(torch.from_numpy(features).to(self.device)).float().cpu().numpy()

    def _logits_and_features(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both as means over the rotations."""
        from pillsnap.models.classifier import logits_and_features, normalise

        classifier = self.classifier
        assert classifier is not None
        inputs = normalise(images, *self._statistics)
        turns = self._settings.evaluation.rotations
        with self._autocast():
            both = [
                logits_and_features(classifier, inputs.rot90(turn * 4 // turns, (2, 3)), self._more_rows)
                for turn in range(turns)
            ]
        logits, features = (torch.stack(each).float().mean(0) for each in zip(*both, strict=True))
        return logits, features

    def _crops(self, photo: AnyPhoto, boxes: np.ndarray) -> list[np.ndarray]:
        return [self._crop(photo, box) for box in boxes]

    def _crop(self, photo: AnyPhoto, box: np.ndarray) -> np.ndarray:
        settings = self._settings.classification
        size_px, margin = settings.image_size_px, settings.crop_margin
        if settings.input == "frame":
            pixels = _decoded(photo, frame_scale(size_px)).pixels
            whole = np.array([0, 0, pixels.shape[1], pixels.shape[0]])
            return augment.crop(pixels, whole, size_px, 0.0, NO_CROP_JITTER, self._rng)
        window = _decoded(photo, crop_scale(box, size_px, margin, NO_CROP_JITTER))
        return augment.crop(window.pixels, window.map_boxes(box), size_px, margin, NO_CROP_JITTER, self._rng)

    def _fused_classifier(self, best: Best) -> Any:
        from pillsnap.models.classifier import input_statistics
        from pillsnap.models.fusion import fused

        model, size_px = self._ready(best), self._settings.classification.image_size_px
        self._statistics = input_statistics(model)
        example = torch.randn(1, 3, size_px, size_px, generator=torch.Generator().manual_seed(0))
        return fused(model, example.to(self.device))

    def _ready(self, best: Best) -> Any:
        return best.model.to(self.device).to(memory_format=torch.channels_last)


def _decoded(photo: AnyPhoto, needed: Scale) -> Window:
    return photo.window(needed) if isinstance(photo, Photo) else Window(photo)


def _window(photos: Sequence[np.ndarray], size_px: int) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the area that the letterboxed photos cover, in whole strides of the detector: removes
    padding that all photos of a batch share.
    """
    shares = np.array([photo.shape[:2] for photo in photos]) / np.max([photo.shape[:2] for photo in photos], 1)[:, None]
    height, width = (min(size_px, math.ceil(share * size_px / _STRIDE) * _STRIDE) for share in shares.max(0))
    left, top = (size_px - width) // 2, (size_px - height) // 2
    return left, top, left + width, top + height


def _in_photo(rows: np.ndarray, window: Window, size_px: int) -> Detections:
    height, width = window.pixels.shape[:2]
    back = np.linalg.inv(augment.letterbox_matrix(width, height, size_px))
    boxes = augment.transform_boxes(rows[:, :4], back)
    low = np.clip(boxes[:, :2], 0, (width, height))
    high = np.clip(boxes[:, :2] + boxes[:, 2:], 0, (width, height))
    scale = (window.scale_x, window.scale_y)
    return Detections(np.concatenate([low / scale, (high - low) / scale], axis=1).astype(np.float32), rows[:, 4])
