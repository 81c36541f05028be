from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pillsnap.evaluate.metrics_json import collect_metrics, split_facts, write_metrics
from pillsnap.evaluate.predictions import Predictions
from tests.unit.conftest import MakeTable

CLASSES = ["K-1", "K-2"]
LEFT, RIGHT = [0, 0, 20, 20], [50, 0, 20, 20]


@pytest.fixture
def manifest(manifest_of: MakeTable) -> pa.Table:
    return manifest_of([{"sample_id": "a", "codes": CLASSES, "boxes": [LEFT, RIGHT]}])


@pytest.fixture
def predictions(detections_of: MakeTable, crops_of: MakeTable, pipeline_of: MakeTable) -> Predictions:
    return Predictions(
        detections_of([("a", [LEFT, RIGHT], [0.9, 0.8])]),
        crops_of([0, 1], [[0, 1], [1, 0]], image_types=["combination"] * 2),
        pipeline_of([("a", [LEFT, RIGHT], [0.9, 0.8], [0, 1])]),
        {},
        temperature=1.5,
    )


def collect(predictions: Predictions, manifest: pa.Table, targets: dict[str, float], **fields: Any) -> dict[str, Any]:
    common = {"run_name": "toy", "stage": 3, "total_time_s": 12.5}
    return collect_metrics(predictions, manifest, CLASSES, targets=targets, **common, **fields)


def test_metrics_have_the_documented_fields(manifest: pa.Table, predictions: Predictions) -> None:
    metrics = collect(predictions, manifest, {"top1": 0.85, "map50": 0.3})
    assert metrics["schema_version"] == 1
    assert (metrics["run"], metrics["stage"], metrics["split"], metrics["total_time_s"]) == ("toy", 3, "val", 12.5)
    assert {"map50", "map50_95", "precision", "recall", "num_photos", "num_boxes"} <= set(metrics["detection"])
    fields = {"top1", "top5", "macro_f1", "num_samples"}
    assert fields | {"single", "combination"} <= set(metrics["classification"])
    assert fields == set(metrics["classification"]["single"]) == set(metrics["classification"]["combination"])
    assert metrics["classification"]["calibration"]["temperature"] == 1.5
    assert {"pill_accuracy", "photo_accuracy", "num_pills", "num_photos"} <= set(metrics["pipeline"])
    assert metrics["classification"]["combination"]["top1"] == metrics["pipeline"]["photo_accuracy"] == 1.0
    assert metrics["targets"]["top1"] == {"target": 0.85, "value": 1.0, "met": True}
    assert (metrics["met"], metrics["misses"]) == (True, [])


def test_run_of_one_task_has_nulls_and_misses_the_target_of_the_other(
    manifest: pa.Table, predictions: Predictions
) -> None:
    metrics = collect(Predictions(predictions.detections, None, None, {}), manifest, {"top1": 0.5})
    assert metrics["classification"] is metrics["pipeline"] is None
    assert metrics["detection"]["recall"] == 1.0
    assert (metrics["met"], metrics["targets"]["top1"]["value"]) == (False, None)
    assert [miss.split(":")[0] for miss in metrics["misses"]] == ["Classification top-1 has no value"]


def test_a_damaged_checkpoint_is_a_miss(manifest: pa.Table, predictions: Predictions) -> None:
    problem = "checkpoints/best.pt is damaged."
    metrics = collect(predictions, manifest, {}, problems=[problem])
    assert (metrics["met"], metrics["misses"]) == (False, [problem])


def test_metrics_file_is_read_back_equal_with_each_curve_on_one_line(
    tmp_path: Path, manifest: pa.Table, predictions: Predictions
) -> None:
    metrics = collect(predictions, manifest, {})
    metrics["note"] = "[ 1,  2 ]"
    path = write_metrics(tmp_path, metrics)
    assert path == tmp_path / "metrics.json"
    assert json.loads(path.read_text()) == metrics
    assert len(path.read_text().splitlines()) < 120
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.json"]


def test_split_facts_count_what_was_also_trained_on(manifest_of: MakeTable) -> None:
    view = {"direction": 0, "latitude": 70, "longitude": 0}
    rows = [
        {"sample_id": "t1", "codes": ["K-1"], "boxes": [None], "split": "train", "group": "g1", **view},
        {"sample_id": "t2", "codes": ["K-2", "K-1"], "boxes": [None, None], "split": "train", "group": "g2"},
        {"sample_id": "v1", "codes": ["K-1"], "boxes": [None], "group": "g1", **view},
        {"sample_id": "v2", "codes": ["K-1"], "boxes": [None], "group": "g3", **{**view, "latitude": 90}},
        {"sample_id": "v3", "codes": ["K-1", "K-2"], "boxes": [None, None], "group": "g4"},
        {"sample_id": "v4", "codes": ["K-3"], "boxes": [None], "group": "g5"},
    ]
    assert split_facts(manifest_of(rows), "val") == {
        "num_photos": 4,
        "num_photos_trained": 2,
        "num_classes": 3,
        "num_classes_not_trained": 1,
        "num_groups": 4,
        "shared_groups": 1,
        "num_combinations": 1,
        "shared_combinations": 1,
        "num_camera_views": 2,
        "shared_camera_views": 1,
    }
