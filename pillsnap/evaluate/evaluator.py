"""Judge a run: both models over the validation photos, figures, verdict, report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from pillsnap.errors import UserError
from pillsnap.evaluate.inference import TABLES, Predictions, predict_manifest
from pillsnap.evaluate.judge import judge, write_metrics
from pillsnap.evaluate.report.page import write_report
from pillsnap.evaluate.verify import model_problems
from pillsnap.observe.events import EventLog, read_events
from pillsnap.runs.directory import Run
from pillsnap.runs.remote_checkpoints import find_run_checkpoint

SPLIT = "val"


def evaluate_run(run: Run, *, compare: dict[str, Any] | None = None) -> dict[str, Any]:
    """Write `predictions/`, `metrics.json` and `report.html`, log the verdict, return the metrics. Ray must be up."""
    photos = run.manifest.filter(pc.equal(run.manifest["split"], SPLIT))
    if not len(photos):
        raise UserError(
            "The manifest has no validation photos to judge on: build it again with sampling.val_fraction above 0."
        )
    problems = model_problems(run)
    predictions = Predictions(None, None, None, {})
    if any(find_run_checkpoint(run.where, task, "best")[0] for task in run.settings.tasks):
        predictions = predict_manifest(photos, run.where, run.settings, run.codes, run.data_root)
    predictions.write(run.run_dir)
    for name in TABLES:  # of an earlier judgement, when the run had more models
        if getattr(predictions, name) is None:
            (run.run_dir / "predictions" / f"{name}.parquet").unlink(missing_ok=True)
    if predictions.errors:
        first = next(iter(predictions.errors.items()))
        problems.append(
            f"{len(predictions.errors)} of {len(photos)} validation photos cannot be read, "
            f"the first {first[0]} ({first[1]})."
        )
    metrics = judge(
        run.run_dir,
        run.manifest,
        run.codes,
        predictions.detections,
        predictions.classification,
        predictions.pipeline,
        run.settings.targets.model_dump(exclude_none=True),
        training_time_s(run.run_dir),
        run.settings.stage,
        SPLIT,
        problems,
    )
    if metrics["classification"]:
        metrics["classification"]["calibration"]["temperature"] = predictions.temperature
    metrics_path = write_metrics(run.run_dir, metrics)
    events = read_events(run.run_dir)
    report_path = write_report(
        run.run_dir,
        metrics,
        manifest=run.manifest,
        classes=run.classes,
        tables={name: getattr(predictions, name) for name in TABLES},
        events=events,
        data_root=run.data_root,
        compare=compare,
        unread=predictions.errors,
        confidence=run.settings.evaluation.confidence,
        max_pixels=run.settings.data.max_pixels,
    )
    with EventLog(run.run_dir) as log:
        log.write(
            "verdict",
            met=metrics["met"],
            targets=metrics["targets"],
            metrics_path=str(metrics_path),
            report_path=str(report_path),
        )
    return metrics


def training_time_s(run_dir: Path) -> float:
    """Seconds that the run's tasks took, over all restarts."""
    durations: dict[str, float] = {}
    for event in read_events(run_dir):
        if event["kind"] == "task" and event["status"] == "finished":
            durations[event["task"]] = event["duration_s"]
    return sum(durations.values())
