"""The two tasks chained: every pill of a combination photo found and named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pillsnap.metrics.boxes import Boxes, Photo, list_arrays, match_boxes, read_boxes, read_photos


@dataclass(frozen=True)
class NamedBoxes:
    """Detections of one photo and the class given to each: `indices` int64 (n,) and `probs` (n,), best score first."""

    boxes: Boxes
    indices: np.ndarray
    probs: np.ndarray


@dataclass(frozen=True)
class PhotoResult:
    """How one photo went; `claims` names for each detection the label box it claims, or -1 for a surplus one."""

    claims: np.ndarray
    right: np.ndarray
    """Whether each detection claims a label box and gives its code; bool (n,)."""
    num_pills: int

    @property
    def num_found(self) -> int:
        return int((self.claims >= 0).sum())

    @property
    def num_right(self) -> int:
        return int(self.right.sum())

    @property
    def num_surplus(self) -> int:
        return int((self.claims < 0).sum())


def read_named_boxes(table: pa.Table) -> dict[str, NamedBoxes]:
    """Rows of a pipeline table by sample id."""
    boxes = read_boxes(table)
    indices, probs = list_arrays(table["indices"]), list_arrays(table["probs"])
    return {
        sample_id: NamedBoxes(found, index[found.order].astype(np.int64), prob[found.order])
        for (sample_id, found), index, prob in zip(boxes.items(), indices, probs, strict=True)
    }


def match_photo(photo: Photo, named: NamedBoxes, classes: Sequence[str]) -> PhotoResult:
    """Match the detections of a photo to its label boxes, one to one at IoU 0.5, and compare their codes."""
    claims = match_boxes(photo.boxes, named.boxes.xywh)
    right = [
        claim >= 0 and classes[index] == photo.codes[claim] for claim, index in zip(claims, named.indices, strict=True)
    ]
    return PhotoResult(claims, np.array(right, dtype=bool), len(photo.codes))


def pipeline_metrics(
    manifest: pa.Table, table: pa.Table, classes: Sequence[str], split: str = "val", image_type: str = "combination"
) -> dict[str, Any]:
    """End-to-end figures over the photos of `image_type` whose every pill has a label box.

    `pill_accuracy`: share of labelled pills whose box is found at IoU 0.5 and whose code is right. `photo_accuracy`:
    share of photos with every labelled pill right; `photo_accuracy_strict` also wants no surplus detection. `detected`:
    share of pills found at all; `named_if_detected`: share of the found pills with the right code. None without photos.
    """
    named = read_named_boxes(table)
    photos = [photo for photo in read_photos(manifest, split) if photo.image_type == image_type]
    complete = [photo for photo in photos if photo.complete and photo.codes]
    judged = [photo for photo in complete if photo.sample_id in named]
    results = [match_photo(photo, named[photo.sample_id], classes) for photo in judged]

    pills = sum(result.num_pills for result in results)
    found = sum(result.num_found for result in results)
    right = sum(result.num_right for result in results)
    all_right = [result.num_right == result.num_pills for result in results]
    strict = [whole and not result.num_surplus for whole, result in zip(all_right, results, strict=True)]
    surplus = sum(result.num_surplus for result in results)
    return {
        "pill_accuracy": _share(right, pills),
        "photo_accuracy": _share(sum(all_right), len(results)),
        "photo_accuracy_strict": _share(sum(strict), len(results)),
        "detected": _share(found, pills),
        "named_if_detected": _share(right, found),
        "surplus_per_photo": _share(surplus, len(results)),
        "num_pills": pills,
        "num_photos": len(results),
        "num_photos_left_out": len(photos) - len(complete),
        "num_photos_unread": len(complete) - len(judged),
    }


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
