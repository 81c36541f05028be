"""End-to-end metrics of both tasks chained: pills of combination photos that are found and named correctly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pillsnap.metrics.boxes import Boxes, Photo, list_arrays, match_boxes, read_boxes, read_photos
from pillsnap.metrics.classification import NO_ANSWER


@dataclass(frozen=True)
class NamedBoxes:
    """Detections of one photo and the class given to each: `indices` int64 (n,) and `probs` (n,), best score first.

    The index is NO_ANSWER and the probability 0 where the logits were not finite.
    """

    boxes: Boxes
    indices: np.ndarray
    probs: np.ndarray


@dataclass(frozen=True)
class PhotoResult:
    """Result of one photo; `claims` has for each detection the index of its label box, or -1 for a surplus one."""

    claims: np.ndarray
    correct: np.ndarray
    """Whether each detection claims a label box and has its code; bool (n,)."""
    num_pills: int

    @property
    def num_found(self) -> int:
        return int((self.claims >= 0).sum())

    @property
    def num_correct(self) -> int:
        return int(self.correct.sum())

    @property
    def num_surplus(self) -> int:
        return int((self.claims < 0).sum())


def read_named_boxes(table: pa.Table) -> dict[str, NamedBoxes]:
    """Rows of a pipeline table by sample id."""
    boxes = read_boxes(table)
    indices, probs = list_arrays(table["indices"]), list_arrays(table["probs"])
    return {
        sample_id: NamedBoxes(
            found, np.where(prob > 0, index, NO_ANSWER)[found.order].astype(np.int64), prob[found.order]
        )
        for (sample_id, found), index, prob in zip(boxes.items(), indices, probs, strict=True)
    }


def match_photo(photo: Photo, named: NamedBoxes, classes: Sequence[str]) -> PhotoResult:
    """Match the detections of a photo to its label boxes, one to one at IoU 0.5, and compare their codes."""
    claims = match_boxes(photo.boxes, named.boxes.xywh)
    correct = [
        claim >= 0 and index >= 0 and classes[index] == photo.codes[claim]
        for claim, index in zip(claims, named.indices, strict=True)
    ]
    return PhotoResult(claims, np.array(correct, dtype=bool), len(photo.codes))


def pipeline_metrics(
    manifest: pa.Table, table: pa.Table, classes: Sequence[str], split: str = "val", image_type: str = "combination"
) -> dict[str, Any]:
    """End-to-end metrics over the photos of `image_type` that have a label box for every pill.

    `pill_accuracy`: share of labelled pills that are found at IoU 0.5 and have the correct code. `photo_accuracy`:
    share of photos with every labelled pill correct; `photo_accuracy_strict`: and without a surplus detection.
    `detected`: share of pills found; `named_if_detected`: share of found pills with the correct code. None without
    photos.
    """
    named = read_named_boxes(table)
    photos = [photo for photo in read_photos(manifest, split) if photo.image_type == image_type]
    complete = [photo for photo in photos if photo.complete and photo.codes]
    evaluated = [photo for photo in complete if photo.sample_id in named]
    results = [match_photo(photo, named[photo.sample_id], classes) for photo in evaluated]

    pills = sum(result.num_pills for result in results)
    found = sum(result.num_found for result in results)
    correct = sum(result.num_correct for result in results)
    all_correct = [result.num_correct == result.num_pills for result in results]
    strict = [whole and not result.num_surplus for whole, result in zip(all_correct, results, strict=True)]
    surplus = sum(result.num_surplus for result in results)
    return {
        "pill_accuracy": _share(correct, pills),
        "photo_accuracy": _share(sum(all_correct), len(results)),
        "photo_accuracy_strict": _share(sum(strict), len(results)),
        "detected": _share(found, pills),
        "named_if_detected": _share(correct, found),
        "surplus_per_photo": _share(surplus, len(results)),
        "num_pills": pills,
        "num_photos": len(results),
        "num_photos_left_out": len(photos) - len(complete),
        "num_photos_unread": len(complete) - len(evaluated),
    }


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
