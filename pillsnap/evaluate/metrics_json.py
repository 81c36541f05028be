"""The contents of `metrics.json`: metrics of the prediction tables, facts about the split, and the targets' results."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from pillsnap.evaluate.predictions import Predictions
from pillsnap.evaluate.targets import check_targets
from pillsnap.files import write_atomically
from pillsnap.metrics.both_sides import both_sides_metrics
from pillsnap.metrics.classification import classification_metrics
from pillsnap.metrics.detection import detection_metrics
from pillsnap.metrics.end_to_end import pipeline_metrics

SCHEMA_VERSION = 1
METRICS_NAME = "metrics.json"
# A JSON string cannot contain a raw line break, so this cannot match within one.
_NUMBER_LIST = re.compile(r"\[\n(?:[\s\d.,eE+-]|null)*\]")


def collect_metrics(
    predictions: Predictions,
    manifest: pa.Table,
    classes: Sequence[str],
    *,
    run_name: str,
    stage: int | str | None,
    targets: Mapping[str, float | None],
    total_time_s: float | None,
    split: str = "val",
    problems: Sequence[str] = (),
) -> dict[str, Any]:
    """The contents of `metrics.json`; fractions are 0 to 1, times in seconds.

    A prediction table of None is a task that was not trained: its metrics are None and its targets are missed.
    `problems` are faults such as a damaged checkpoint, one line each; with any of them `met` is false. `misses` has one
    line per reason why `met` is false.
    """
    detections, crops, named = predictions.detections, predictions.classification, predictions.pipeline
    metrics: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "run": run_name,
        "stage": stage,
        "split": split,
        "split_facts": split_facts(manifest, split) | {"chose_models": predictions.fitted_here},
        "detection": None if detections is None else detection_metrics(manifest, detections, split),
        "classification": None if crops is None else classification_metrics(crops, classes),
        "pipeline": None if named is None else pipeline_metrics(manifest, named, classes, split),
        "total_time_s": total_time_s,
    }
    if metrics["classification"]:
        metrics["classification"]["calibration"]["temperature"] = predictions.temperature
        if predictions.both_sides is not None:
            metrics["classification"]["both_sides"] = both_sides_metrics(predictions.both_sides)
    results, misses = check_targets(metrics, targets)
    misses += problems
    return {**metrics, "targets": results, "met": not misses, "misses": misses}


def split_facts(manifest: pa.Table, split: str) -> dict[str, Any]:
    """Number of photos in the split, and how much of it was also trained on.

    `shared_groups` and `shared_combinations` (sets of codes) occur in the split and in training; `camera_views` are the
    distinct (direction, latitude, longitude) of single photos by code, where file names contain them.
    """
    groups: dict[bool, set[str]] = {True: set(), False: set()}
    combinations: dict[bool, set[tuple[str, ...]]] = {True: set(), False: set()}
    views: dict[bool, set[tuple[Any, ...]]] = {True: set(), False: set()}
    codes: dict[bool, set[str]] = {True: set(), False: set()}
    photos = {True: 0, False: 0}
    names = ("split", "group", "image_type", "codes", "direction", "latitude", "longitude")
    for row_split, group, image_type, row_codes, *camera in zip(*(manifest[n].to_pylist() for n in names), strict=True):
        if row_split not in (split, "train"):
            continue
        held_out = row_split == split
        photos[held_out] += 1
        groups[held_out].add(group)
        codes[held_out].update(row_codes)
        if image_type == "combination":
            combinations[held_out].add(tuple(sorted(row_codes)))
        elif None not in camera:
            views[held_out].add((*row_codes, *camera))
    return {
        "num_photos": photos[True],
        "num_photos_trained": photos[False],
        "num_classes": len(codes[True]),
        "num_classes_not_trained": len(codes[True] - codes[False]),
        "num_groups": len(groups[True]),
        "shared_groups": len(groups[True] & groups[False]),
        "num_combinations": len(combinations[True]),
        "shared_combinations": len(combinations[True] & combinations[False]),
        "num_camera_views": len(views[True]),
        "shared_camera_views": len(views[True] & views[False]),
    }


def write_metrics(folder: Path, metrics: Mapping[str, Any]) -> Path:
    """Write `metrics.json` into the folder, atomically, each list of numbers on one line. Returns its path."""
    text = json.dumps(metrics, ensure_ascii=False, indent=2, allow_nan=False)
    text = _NUMBER_LIST.sub(lambda match: "[" + " ".join(match.group()[1:-1].split()) + "]", text)
    path = Path(folder) / METRICS_NAME
    write_atomically(path, (text + "\n").encode("utf-8"))
    return path
