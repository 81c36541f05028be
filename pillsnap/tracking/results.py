"""Evaluation results for W&B: metrics, PR curve, confusion matrix, per-class table and example photos.

Reads `metrics.json` and `predictions/*.parquet` of the run directory, written by `evaluate`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

EVALUATION = "evaluation"
MAX_TABLE_ROWS = 10_000  # limit of W&B
NUM_PAIRS = 200
NUM_WORST, NUM_EXAMPLES = 16, 8
PICTURE_PX = 640
_OUTCOMES = ("right", "wrong", "missed", "surplus")
# With more classes, the labels of the confusion matrix would overlap.
_MAX_NAMED_CLASSES = 60


def log_results(wandb: Any, run: Any, run_dir: Path, verdict: Mapping[str, Any]) -> None:
    """Log the verdict event and, if present, metrics and predictions of the run directory."""
    summary: dict[str, Any] = {"verdict/met": verdict["met"]}
    for name, target in verdict["targets"].items():
        summary |= {f"verdict/{name}": target["value"], f"verdict/{name}_target": target["target"]}
    row: dict[str, Any] = {}
    if (run_dir / "metrics.json").exists():
        metrics = json.loads((run_dir / "metrics.json").read_text(encoding="utf-8"))
        summary |= _scalars(metrics)
        row |= _curve(wandb, metrics)
    if (run_dir / "predictions").is_dir() and (run_dir / "config.json").exists():
        row |= _from_predictions(wandb, run, run_dir)
    if row:
        run.log(row)
    run.summary.update({name: value for name, value in summary.items() if value is not None})
    met = sum(target["met"] for target in verdict["targets"].values())
    title = "Targets met" if verdict["met"] else "Targets missed"
    text = f"{met} of {len(verdict['targets'])} targets met"
    run.alert(title, text, level="INFO" if verdict["met"] else "WARN")


def confusion_picture(matrix: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Confusion matrix (n, n; rows true, columns predicted) as RGB pixels, shaded by the share of the row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    figure = Figure(figsize=(12, 11), dpi=100, layout="constrained")
    axes = figure.subplots()
    drawn = axes.imshow(np.sqrt(share), cmap="magma_r", vmin=0, vmax=1, interpolation="nearest")
    bar = figure.colorbar(drawn, ax=axes, shrink=0.6, ticks=np.sqrt([0, 0.05, 0.25, 0.5, 1]))
    bar.ax.set_yticklabels(["0 %", "5 %", "25 %", "50 %", "100 %"])
    bar.set_label("share of the crops of the true class")
    if len(names) <= _MAX_NAMED_CLASSES:
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _scalars(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Every number of `metrics.json` by path: detection/map50, classification/single/top1, …"""
    scalars: dict[str, Any] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping) and name != "targets":
            scalars |= {f"{name}/{key}": each for key, each in _scalars(value).items()}
        elif isinstance(value, int | float) and name not in ("schema_version", "stage", "met"):
            scalars[name] = value
    return scalars


def _curve(wandb: Any, metrics: Mapping[str, Any]) -> dict[str, Any]:
    curve = (metrics["detection"] or {}).get("pr_curve")
    if not curve:
        return {}
    rows = [list(point) for point in zip(curve["recall"], curve["precision"], strict=True)]
    table = wandb.Table(columns=["recall", "precision"], data=rows)
    return {"detection/pr_curve": wandb.plot.line(table, "recall", "precision", title="Precision over recall, IoU 0.5")}


def _from_predictions(wandb: Any, run: Any, run_dir: Path) -> dict[str, Any]:
    from pillsnap.runs.directory import load_run

    evaluated = load_run(run_dir)
    files = {name: run_dir / "predictions" / f"{name}.parquet" for name in ("detections", "classification", "pipeline")}
    tables = {name: pq.read_table(path) if path.exists() else None for name, path in files.items()}
    row: dict[str, Any] = {}
    if tables["classification"] is not None:
        names = {entry.code: entry.name for entry in evaluated.classes}
        row |= _classification(wandb, run, tables["classification"], evaluated.codes, names)
    return row | _photos(wandb, evaluated, tables)


def _classification(
    wandb: Any, run: Any, table: pa.Table, codes: list[str], names: Mapping[str, str]
) -> dict[str, Any]:
    from pillsnap.metrics.classification import confused_pairs, confusion_matrix, per_class, read_crops

    crops = read_crops(table)
    matrix = confusion_matrix(crops.labels, crops.predicted, len(codes))
    artifact = wandb.Artifact(
        f"{run.id}-confusion", type="evaluation", metadata={"rows": "true", "columns": "predicted"}
    )
    with artifact.new_file("confusion.npz", mode="wb") as file:
        np.savez_compressed(file, matrix=matrix, codes=np.array(codes))
    run.log_artifact(artifact)

    pairs = confused_pairs(crops.labels, crops.predicted, codes, limit=NUM_PAIRS)
    columns = ("true", "predicted", "count", "n")
    rows = sorted(per_class(crops.labels, crops.predicted, codes), key=lambda each: (each["f1"] or 0.0, each["code"]))
    figures = ("n", "precision", "recall", "f1")
    return {
        "classification/confusion": wandb.Image(
            confusion_picture(matrix, codes), caption="true down, predicted across"
        ),
        "classification/confused_pairs": wandb.Table(
            columns=["true", "predicted", "crops", "of"], data=[[pair[name] for name in columns] for pair in pairs]
        ),
        "classification/classes": wandb.Table(
            columns=["code", "name", "crops", "precision", "recall", "f1"],
            data=[[each["code"], names.get(each["code"], ""), *(each[name] for name in figures)] for each in rows][
                :MAX_TABLE_ROWS
            ],
        ),
    }


def _photos(wandb: Any, evaluated: Any, tables: Mapping[str, pa.Table | None]) -> dict[str, Any]:
    """The worst and some correct photos, with boxes for W&B to draw."""
    from pillsnap.evaluate.report import gallery
    from pillsnap.metrics.boxes import read_photos
    from pillsnap.photos.decode import BadImage
    from pillsnap.photos.reader import PhotoReader

    reader = PhotoReader(evaluated.data_root, evaluated.settings.data.max_pixels)
    confidence = evaluated.settings.evaluation.confidence
    cases = gallery.photo_outcomes(read_photos(evaluated.manifest, "val"), tables, evaluated.codes, confidence)
    row = {}
    for name, chosen in (
        ("worst", gallery.worst(cases, NUM_WORST)),
        ("right", gallery.examples(cases, NUM_EXAMPLES)),
    ):
        read = [(case, reader.read(case.photo.location)) for case in chosen]
        pictures = [_picture(wandb, case, photo) for case, photo in read if not isinstance(photo, BadImage)]
        if pictures:
            row[f"photos/{name}"] = pictures
    return row


def _picture(wandb: Any, case: Any, photo: np.ndarray) -> Any:
    import cv2

    scale = min(1.0, PICTURE_PX / max(photo.shape[:2]))
    size = (max(1, round(photo.shape[1] * scale)), max(1, round(photo.shape[0] * scale)))
    found = [
        _box(
            pill.box * scale, _OUTCOMES.index(pill.outcome), pill.predicted or f"{pill.true} not found", pill.confidence
        )
        for pill in case.pills
        if pill.box is not None
    ]
    labels = [
        _box(box * scale, 0, code, None)
        for box, code in zip(case.photo.boxes, case.photo.codes, strict=True)
        if not np.isnan(box).any()
    ]
    return wandb.Image(
        cv2.resize(photo, size, interpolation=cv2.INTER_AREA),
        caption=f"{case.photo.sample_id}: {', '.join(case.photo.codes)}",
        file_type="jpg",
        boxes={
            "predictions": {"box_data": found, "class_labels": dict(enumerate(_OUTCOMES))},
            "labels": {"box_data": labels, "class_labels": {0: "label"}},
        },
    )


def _box(xywh: np.ndarray, kind: int, caption: str, confidence: float | None) -> dict[str, Any]:
    x, y, width, height = (float(value) for value in xywh)
    return {
        "position": {"minX": x, "maxX": x + width, "minY": y, "maxY": y + height},
        "domain": "pixel",
        "class_id": kind,
        "box_caption": caption,
        **({} if confidence is None else {"scores": {"confidence": float(confidence)}}),
    }
