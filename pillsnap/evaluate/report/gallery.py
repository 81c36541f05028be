"""Selects the photos that the report shows, the worst and some correct ones, and prepares them with their boxes."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pillsnap.metrics.boxes import Boxes, Photo, match_boxes, read_boxes
from pillsnap.metrics.classification import read_crops
from pillsnap.metrics.end_to_end import NamedBoxes, match_photo, read_named_boxes
from pillsnap.photos.decode import BadImage
from pillsnap.photos.reader import PhotoReader

SIDE_PX = 480
_JPEG_QUALITIES = (82, 65, 45)
_MAX_JPEG_BYTES = 60_000
_FONT_PX = 24
_MAX_LINES = 6


@dataclass(frozen=True)
class Pill:
    """One pill or detection: `outcome` is right, wrong (code), missed or surplus; `box` x y w h, None where unknown."""

    outcome: str
    box: np.ndarray | None
    true: str | None = None
    predicted: str | None = None
    confidence: float | None = None


@dataclass(frozen=True)
class PhotoOutcome:
    """A photo and the outcome of each of its pills."""

    photo: Photo
    pills: tuple[Pill, ...]

    @property
    def error(self) -> float:
        """Mistakes per labelled pill, plus up to 0.2 for the highest confidence of a wrong code."""
        cost = {"right": 0.0, "wrong": 1.0, "missed": 1.0, "surplus": 0.5}
        mistakes = sum(cost[pill.outcome] for pill in self.pills) / max(len(self.photo.codes), 1)
        return mistakes + 0.2 * max((p.confidence or 0.0 for p in self.pills if p.outcome == "wrong"), default=0.0)


def photo_outcomes(
    photos: Sequence[Photo], tables: Mapping[str, pa.Table | None], classes: Sequence[str], confidence: float
) -> list[PhotoOutcome]:
    """The result of each photo with complete labels, by the first table of `tables` that is not None: pipeline,
    classification (labelled crops), detections (of `confidence` or more).
    """
    pipeline, crops, detections = (tables.get(name) for name in ("pipeline", "classification", "detections"))
    if pipeline is not None:
        named = read_named_boxes(pipeline)
        return [_by_pipeline(p, named[p.sample_id], classes) for p in photos if p.complete and p.sample_id in named]
    if crops is not None:
        return _by_crops(photos, crops, classes)
    if detections is not None:
        found = read_boxes(detections)
        return [_by_boxes(p, found[p.sample_id], confidence) for p in photos if p.complete and p.sample_id in found]
    return []


def worst(cases: Sequence[PhotoOutcome], count: int) -> list[PhotoOutcome]:
    """The photos with the largest errors, one of each set of codes before a second of any."""
    bad = sorted((case for case in cases if case.error > 0), key=lambda case: (-case.error, case.photo.sample_id))
    return _varied(bad, count)


def examples(cases: Sequence[PhotoOutcome], count: int) -> list[PhotoOutcome]:
    """Photos without a mistake, spread over the split, as many single photos as combinations."""
    good = [case for case in cases if case.error == 0 and case.pills]
    chosen: list[PhotoOutcome] = []
    kinds = sorted({case.photo.image_type for case in good})
    for kind in kinds:
        of_kind = _varied([case for case in good if case.photo.image_type == kind], len(good))
        share = max(count // len(kinds), 1)
        chosen += of_kind[:: max(len(of_kind) // share, 1)][:share]
    return chosen[:count]


def picture(case: PhotoOutcome, reader: PhotoReader) -> dict[str, Any]:
    """Template data of one photo: `drawing` with its boxes (or `problem`, why it cannot be read) and the `pills`."""
    photo = reader.read(case.photo.location)
    return {
        "sample_id": case.photo.sample_id,
        "problem": str(photo) if isinstance(photo, BadImage) else None,
        "drawing": None if isinstance(photo, BadImage) else _drawing(case, photo),
        "pills": [(pill.outcome, _sentence(pill)) for pill in case.pills[:_MAX_LINES]],
        "num_more": max(len(case.pills) - _MAX_LINES, 0),
    }


def _by_pipeline(photo: Photo, named: NamedBoxes, classes: Sequence[str]) -> PhotoOutcome:
    result = match_photo(photo, named, classes)
    pills = []
    for claim, is_correct, box, index, prob in zip(
        result.claims, result.correct, named.boxes.xywh, named.indices, named.probs, strict=True
    ):
        outcome = "surplus" if claim < 0 else "right" if is_correct else "wrong"
        true = photo.codes[claim] if claim >= 0 else None
        pills.append(Pill(outcome, box, true, _name(index, classes), float(prob)))
    return PhotoOutcome(photo, (*pills, *_missed(photo, result.claims)))


def _by_boxes(photo: Photo, found: Boxes, confidence: float) -> PhotoOutcome:
    kept = found.scores >= confidence
    claims = match_boxes(photo.boxes, found.xywh[kept])
    pills = [
        Pill("surplus" if claim < 0 else "right", box, "pill" if claim >= 0 else None, "pill", float(score))
        for claim, box, score in zip(claims, found.xywh[kept], found.scores[kept], strict=True)
    ]
    return PhotoOutcome(photo, (*pills, *_missed(photo, claims)))


def _by_crops(photos: Sequence[Photo], table: pa.Table, classes: Sequence[str]) -> list[PhotoOutcome]:
    crops = read_crops(table)
    by_id = {photo.sample_id: photo for photo in photos}
    pills: dict[str, list[Pill]] = {}
    columns = (table["sample_id"].to_pylist(), table["box_index"].to_pylist(), crops.predicted, crops.probs[:, 0])
    for sample_id, box_index, predicted, prob in zip(*columns, strict=True):
        photo = by_id.get(sample_id)
        if photo is not None:
            box = None if np.isnan(photo.boxes[box_index]).any() else photo.boxes[box_index]
            name = _name(predicted, classes)
            outcome = "right" if name == photo.codes[box_index] else "wrong"
            pill = Pill(outcome, box, photo.codes[box_index], name, float(prob))
            pills.setdefault(sample_id, []).append(pill)
    return [PhotoOutcome(by_id[sample_id], tuple(found)) for sample_id, found in pills.items()]


def _name(index: int, classes: Sequence[str]) -> str:
    return classes[index] if index >= 0 else "no class"


def _missed(photo: Photo, claims: np.ndarray) -> Iterable[Pill]:
    found = set(claims.tolist())
    return [Pill("missed", photo.boxes[i], code) for i, code in enumerate(photo.codes) if i not in found]


def _varied(cases: Sequence[PhotoOutcome], count: int) -> list[PhotoOutcome]:
    seen: set[tuple[str, ...]] = set()
    first: list[PhotoOutcome] = []
    later: list[PhotoOutcome] = []
    for case in cases:
        key = tuple(sorted(case.photo.codes))
        (later if key in seen else first).append(case)
        seen.add(key)
    return (first + later)[:count]


def _sentence(pill: Pill) -> str:
    sure = "" if pill.confidence is None else f", {100 * pill.confidence:.0f} %"
    if pill.outcome == "right":
        return f"{pill.true}{sure}"
    if pill.outcome == "wrong":
        return f"{pill.true} taken for {pill.predicted}{sure}"
    if pill.outcome == "missed":
        return f"{pill.true} not found"
    return f"no labelled pill here, taken for {pill.predicted}{sure}"


def _drawing(case: PhotoOutcome, photo: np.ndarray) -> dict[str, Any]:
    import cv2

    left, top, width, height = _window(case, photo.shape[1], photo.shape[0])
    photo = photo[top : top + height, left : left + width]
    scale = min(SIDE_PX / max(height, width), 1.0)
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    small = cv2.cvtColor(cv2.resize(photo, size, interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2BGR)
    for quality in _JPEG_QUALITIES:
        data = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
        if len(data) <= _MAX_JPEG_BYTES:
            break
    boxed = [(pill, (pill.box - (left, top, 0, 0)) * scale) for pill in case.pills if pill.box is not None]
    return {
        "source": f"data:image/jpeg;base64,{base64.b64encode(data).decode()}",
        "width": size[0],
        "height": size[1],
        "boxes": [(pill.outcome, np.round(box, 1).tolist()) for pill, box in boxed],
        "plates": [_plate(pill, box, size) for pill, box in boxed],
        "font_px": _FONT_PX,
    }


def _window(case: PhotoOutcome, width: int, height: int) -> tuple[int, int, int, int]:
    """The part to show, x y w h: all boxes with a margin, in the photo's aspect ratio, at least half of its size, so
    that the imprint of a single pill can be read in the report.
    """
    boxes = np.array([pill.box for pill in case.pills if pill.box is not None]).reshape(-1, 4)
    if not len(boxes):
        return 0, 0, width, height
    low, high = boxes[:, :2].min(0), (boxes[:, :2] + boxes[:, 2:]).max(0)
    share = float(np.clip(1.6 * ((high - low) / (width, height)).max(), 0.5, 1.0))
    size = np.array([round(share * width), round(share * height)])
    corner = np.clip((low + high - size) / 2, 0, (width, height) - size).round().astype(int)
    return int(corner[0]), int(corner[1]), int(size[0]), int(size[1])


def _plate(pill: Pill, box: np.ndarray, size: tuple[int, int]) -> dict[str, Any]:
    """The code of a box above it, or below where there is no room."""
    x, y, _, height = (float(value) for value in box)
    text = pill.predicted or pill.true or ""
    text = text if len(text) <= 16 else f"{text[:15]}…"
    wide, tall = 0.6 * _FONT_PX * len(text) + 10, _FONT_PX + 5
    left = min(max(x - 1.5, 0), max(size[0] - wide, 0))
    top = y - tall if y >= tall else min(y + height, size[1] - tall)
    corner = {"x": round(left, 1), "y": round(top, 1), "width": round(wide, 1), "height": tall}
    return {"outcome": pill.outcome, "text": text, **corner}
