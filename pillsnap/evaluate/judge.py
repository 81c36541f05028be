"""The judge: prediction tables and a manifest become the figures and the verdict of `metrics.json`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from pillsnap.evaluate.targets import check_targets
from pillsnap.files import write_atomically
from pillsnap.metrics.classification import classification_metrics
from pillsnap.metrics.detection import detection_metrics
from pillsnap.metrics.end_to_end import pipeline_metrics

SCHEMA_VERSION = 1
METRICS_NAME = "metrics.json"
# A JSON string never holds a raw line break, so this cannot match within one.
_NUMBER_LIST = re.compile(r"\[\n(?:[\s\d.,eE+-]|null)*\]")


def judge(
    run_dir: Path,
    manifest: pa.Table,
    classes: Sequence[str],
    detections: pa.Table | None,
    classification: pa.Table | None,
    pipeline: pa.Table | None,
    targets: Mapping[str, float | None],
    total_time_s: float | None,
    stage: int | str | None,
    split: str = "val",
    problems: Sequence[str] = (),
) -> dict[str, Any]:
    """Everything that `metrics.json` holds; fractions are 0 to 1, times in seconds.

    A table of None is a task that was not trained: its part is None and a target on it is missed. `problems` are
    faults found elsewhere, one line each (a torn checkpoint): with any of them the verdict is not met. `misses` has one
    line for each reason why `met` is false.
    """
    metrics: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "run": Path(run_dir).name,
        "stage": stage,
        "split": split,
        "split_facts": split_facts(manifest, split),
        "detection": None if detections is None else detection_metrics(manifest, detections, split),
        "classification": None if classification is None else classification_metrics(classification, classes),
        "pipeline": None if pipeline is None else pipeline_metrics(manifest, pipeline, classes, split),
        "total_time_s": total_time_s,
    }
    judged, misses = check_targets(metrics, targets)
    misses += problems
    return {**metrics, "targets": judged, "met": not misses, "misses": misses}


def split_facts(manifest: pa.Table, split: str) -> dict[str, Any]:
    """How many photos the split holds, and what of it training has seen, so that a reader can weigh the figures.

    `shared_groups` and `shared_combinations` (sets of codes) occur on both sides; `camera_views` are the distinct
    (direction, latitude, longitude) of single photos by code, where file names give them.
    """
    groups: dict[bool, set[str]] = {True: set(), False: set()}
    combinations: dict[bool, set[tuple[str, ...]]] = {True: set(), False: set()}
    views: dict[bool, set[tuple[Any, ...]]] = {True: set(), False: set()}
    codes: dict[bool, set[str]] = {True: set(), False: set()}
    photos = {True: 0, False: 0}
    names = ("split", "group", "image_type", "codes", "direction", "latitude", "longitude")
    for row_split, group, image_type, row_codes, *camera in zip(*(manifest[n].to_pylist() for n in names), strict=True):
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


def write_metrics(run_dir: Path, metrics: Mapping[str, Any]) -> Path:
    """Write `metrics.json` into the run directory, atomically; curves stay on one line each. Returns its path."""
    text = json.dumps(metrics, ensure_ascii=False, indent=2, allow_nan=False)
    text = _NUMBER_LIST.sub(lambda match: "[" + " ".join(match.group()[1:-1].split()) + "]", text)
    path = Path(run_dir) / METRICS_NAME
    write_atomically(path, (text + "\n").encode("utf-8"))
    return path
