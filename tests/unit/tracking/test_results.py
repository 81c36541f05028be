"""Evaluation in W&B: metrics, PR curve, confusion matrix, per-class table, and photos with boxes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from pillsnap.config import load_settings
from pillsnap.evaluate.metrics_json import collect_metrics, write_metrics
from pillsnap.evaluate.predictions import Predictions
from pillsnap.observe.events import EventLog
from pillsnap.runs.directory import Run, open_run
from pillsnap.tracking.mirror import WandbMirror
from pillsnap.tracking.results import confusion_picture

History = Callable[[Path], list[dict[str, Any]]]


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    home = tmp_path_factory.mktemp("home")
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR"):
        monkeypatch.setenv(name, str(home))


def predict(run: Run) -> dict[str, pa.Table]:
    """Predictions with every label box found and every third crop assigned to the next class."""
    rows = run.manifest.filter(pc.equal(run.manifest["split"], "val")).to_pylist()
    crops, found = [], []
    for row in rows:
        common = {"sample_id": row["sample_id"], "image_type": row["image_type"]}
        pairs = [(code, box) for code, box in zip(row["codes"], row["boxes"], strict=True) if box is not None]
        indices = []
        for box_index, (code, _) in enumerate(pairs):
            label = run.codes.index(code)
            guess = (label + 1) % len(run.codes) if len(crops) % 3 == 0 else label
            indices.append(guess)
            top = {"top_indices": [guess, (guess + 1) % len(run.codes)], "top_probs": [0.9, 0.1]}
            crops.append(
                {
                    **common,
                    "box_index": box_index,
                    "label": label,
                    "raw_confidence": 0.9,
                    "held_out_confidence": 0.9,
                    **top,
                }
            )
        boxes = {"boxes": [box for _, box in pairs], "scores": [0.9] * len(pairs)}
        found.append({**common, **boxes, "indices": indices, "probs": [0.9] * len(pairs)})
    named = pa.Table.from_pylist(found)
    return {
        "detections": named.drop_columns(["indices", "probs"]),
        "classification": pa.Table.from_pylist(crops),
        "pipeline": named,
    }


@pytest.fixture
def evaluated(toy_manifest: Path, toy_tree: Path, tmp_path: Path) -> Run:
    run, _ = open_run(tmp_path / "run", load_settings("demo"), toy_manifest, toy_tree)
    tables = predict(run)
    (run.run_dir / "predictions").mkdir()
    for name, table in tables.items():
        pq.write_table(table, run.run_dir / "predictions" / f"{name}.parquet")
    targets = {"top1": 0.99, "map50": 0.3}
    metrics = collect_metrics(
        Predictions(**tables, errors={}), run.manifest, run.codes, run_name="run", stage=1, targets=targets,
        total_time_s=60.0,
    )  # fmt: skip
    write_metrics(run.run_dir, metrics)
    with EventLog(run.run_dir) as log:
        facts = {"name": "toy", "stage": 1, "config": {}, "manifest_hash": "h", "num_workers": 1, "versions": {}}
        log.write("run", run_id=run.run_id, **facts)
        log.write("verdict", met=False, targets=metrics["targets"])
    return run


def test_evaluation_run_is_complete(
    evaluated: Run, offline_history: History, offline_records: Callable[[Path], Iterator[Any]]
) -> None:
    lines: list[str] = []
    warnings: list[str] = []
    WandbMirror(evaluated.run_dir, "p", mode="offline", on_warning=warnings.append, say=lines.append).start().close()
    assert warnings == [], (evaluated.run_dir / "wandb" / "mirror.log").read_text()[-2000:]
    (folder,) = (evaluated.run_dir / "wandb").glob("offline-run-*-evaluation")
    assert lines == [f"wandb sync {folder}"]
    (row,) = offline_history(folder)
    metrics = json.loads((evaluated.run_dir / "metrics.json").read_text())
    tables = {path.name.split("_0_")[0]: path for path in (folder / "files" / "media" / "table").rglob("*.json")}
    classes = json.loads(tables["classes"].read_text())
    assert classes["columns"] == ["code", "name", "crops", "precision", "recall", "f1"]
    assert sum(each[2] for each in classes["data"]) == metrics["classification"]["num_samples"]
    assert [each[5] for each in classes["data"]] == sorted(each[5] for each in classes["data"])
    pairs = json.loads(tables["confused_pairs"].read_text())["data"]
    expected = [[p["true"], p["predicted"], p["count"], p["n"]] for p in metrics["classification"]["confused_pairs"]]
    assert pairs == expected and len(pairs) > 1
    curve = json.loads(tables["pr_curve_table"].read_text())
    assert curve["columns"] == ["recall", "precision"] and len(curve["data"]) == 101
    assert row["classification/confusion._type"] == "image-file"
    assert row["photos/worst.count"] >= 3

    records = list(offline_records(folder))
    (alert,) = [r.alert for r in records if r.WhichOneof("record_type") == "alert"]
    assert (alert.title, alert.text) == ("Targets missed", "1 of 2 targets met")
    summary = {
        item.key or ".".join(item.nested_key): json.loads(item.value_json)
        for record in records
        if record.WhichOneof("record_type") == "summary"
        for item in record.summary.update
    }
    assert summary["classification/top1"] == metrics["classification"]["top1"]
    assert summary["pipeline/pill_accuracy"] == metrics["pipeline"]["pill_accuracy"]
    assert summary["verdict/top1_target"] == 0.99 and summary["verdict/met"] is False

    artifacts = [r.artifact for r in records if r.WhichOneof("record_type") == "artifact"]
    (confusion,) = [a for a in artifacts if a.name.endswith("-confusion")]
    with np.load(confusion.manifest.contents[0].local_path) as saved:
        assert saved["matrix"].sum() == metrics["classification"]["num_samples"]
        assert saved["matrix"].trace() == round(metrics["classification"]["top1"] * saved["matrix"].sum())
        assert saved["codes"].tolist() == evaluated.codes


def test_boxes_are_within_the_photos(evaluated: Run) -> None:
    WandbMirror(evaluated.run_dir, "p", mode="offline", say=lambda line: None).start().close()
    (folder,) = (evaluated.run_dir / "wandb").glob("offline-run-*-evaluation")
    found = [json.loads(p.read_text()) for p in (folder / "files/media/metadata/boxes2D/photos").glob("worst_*.json")]
    boxes = [box for each in found for box in each["box_data"]]
    assert {box["class_id"] for box in boxes} >= {0, 1}  # correct and wrong
    assert any(" " not in box["box_caption"] and box["box_caption"].startswith("K-") for box in boxes)
    for box in boxes:
        edges = box["position"]
        assert 0 <= edges["minX"] < edges["maxX"] <= 320 and 0 <= edges["minY"] < edges["maxY"] <= 320
        assert box["domain"] == "pixel"


def test_confusion_picture_of_a_thousand_classes() -> None:
    matrix = np.eye(1000, dtype=np.int32) * 9
    matrix[7, 900] = 9
    picture = confusion_picture(matrix, [f"K-{i:06d}" for i in range(1000)])
    assert picture.dtype == np.uint8 and picture.shape[2] == 3 and min(picture.shape[:2]) >= 1000
    assert (picture.max(-1).astype(int) - picture.min(-1)).max() > 60  # colored cells
