"""Evaluates a run: both models over the validation photos, metrics, targets, report."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from pillsnap.errors import UserError
from pillsnap.evaluate.answers import count_answers, fit_to_training, judge
from pillsnap.evaluate.enrolled import enrolled_metrics
from pillsnap.evaluate.metrics_json import collect_metrics, write_metrics
from pillsnap.evaluate.predictions import Predictions, predict_manifest
from pillsnap.evaluate.report.page import write_report
from pillsnap.evaluate.restricted import restricted_metrics
from pillsnap.evaluate.verify import exported_problems
from pillsnap.files import write_atomically
from pillsnap.metrics.breakdown import attribute_accuracy, weighted_accuracy
from pillsnap.metrics.limits import LIMITS_NAME, Limits, read_limits
from pillsnap.observe.events import EventLog, read_events
from pillsnap.observe.work_progress import Progress, unseen
from pillsnap.runs.best_checkpoints import best_checkpoints
from pillsnap.runs.checkpoint import Checkpoint
from pillsnap.runs.directory import Run

_RECORD_EVERY_S = 5.0


def evaluate_run(
    run: Run,
    *,
    compare: dict[str, Any] | None = None,
    split: str = "val",
    allowed: list[str] | None = None,
    counts: Mapping[str, float] | None = None,
    progress: Progress = unseen,
) -> dict[str, Any]:
    """Write `predictions/`, `metrics.json` and `report.html` of one split, and return the metrics.

    Those of the run's own validation split are in the run directory, and log the `verdict` event; those of another
    split or manifest are in a folder of their own, `folder` of the metrics. `compare` are metrics of an earlier run,
    shown in the report. With `allowed` codes, `restricted` in the metrics has those of answers restricted to them; with
    `counts` by code, `classification` has `weighted`; where drugs were enrolled after the training, `enrolled` has the
    metrics with them. Ray must be initialised.
    """
    photos = run.manifest.filter(pc.equal(run.manifest["split"], split))
    if not len(photos):
        raise UserError(
            f"The manifest has no photos of the split {split!r}: build it again with sampling.val_fraction above 0, or "
            "import it again with --val-fraction."
        )
    if not run.results_folder(split):
        progress = _recorded(progress, run.run_dir)
    best, problems = best_checkpoints(run.where, run.settings.tasks)
    problems += exported_problems(run)
    predictions = Predictions(None, None, None, {})
    limits = None
    if best:
        # Other photos had no part in choosing epochs and fitting the temperature.
        fitted_here = split == "val" and next(iter(best.values())).meta["manifest_hash"] == run.manifest_hash
        limits = _limits(run, best.get("classification"), fitted_here, partial(progress, "training photos"))
        predictions = predict_manifest(
            photos, run.where, run.settings, run.codes, run.data_root, fitted_here=fitted_here, limits=limits,
            progress=partial(progress, f"{split} photos"),
        )  # fmt: skip
    complete, completed = run.with_enrolled(), predictions
    if complete.enrolled is not None and predictions.classification is not None:
        completed = predict_manifest(
            photos, run.where, run.settings, complete.codes, run.data_root,
            fitted_here=predictions.fitted_here, detect=allowed is not None, enrolled=complete.enrolled,
            progress=partial(progress, f"{split} photos, with enrolled drugs"),
        )  # fmt: skip
    folder = run.run_dir / run.results_folder(split)
    predictions.write(folder)
    if predictions.errors:
        sample_id, reason = next(iter(predictions.errors.items()))
        problems.append(
            f"{len(predictions.errors)} of {len(photos)} {split} photos cannot be read, "
            f"the first {sample_id} ({reason})."
        )
    metrics = collect_metrics(
        predictions,
        run.manifest,
        run.codes,
        run_name=run.run_dir.name,
        stage=run.settings.stage,
        targets=run.settings.targets.model_dump(exclude_none=True),
        total_time_s=training_time_s(run.run_dir),
        split=split,
        problems=problems,
    ) | {"folder": run.results_folder(split)}
    if predictions.classification is not None:
        attributes = [info.attributes for info in run.classes]
        if any(attributes):
            metrics["classification"]["by_attribute"] = attribute_accuracy(predictions.classification, attributes)
        if limits is not None and len(predictions.classification):
            limits, metrics["classification"]["answers"] = judge(
                predictions, run.manifest, limits, run.settings.evaluation
            )
            if predictions.pipeline is not None:
                metrics["pipeline"]["answers"] = count_answers(limits, predictions.pipeline)
            if predictions.fitted_here:
                write_atomically(run.run_dir / LIMITS_NAME, limits.to_bytes())
        if counts is not None:
            metrics["classification"]["weighted"] = weighted_accuracy(predictions.classification, run.codes, counts)
    if completed is not predictions:
        metrics["enrolled"] = enrolled_metrics(complete, predictions, completed)
    if allowed is not None:
        metrics["restricted"] = restricted_metrics(
            complete, photos, allowed, completed, split, partial(progress, f"{split} photos, with the list")
        )
    metrics_path = write_metrics(folder, metrics)
    report_path = write_report(
        folder,
        metrics,
        predictions,
        manifest=run.manifest,
        classes=run.classes,
        events=read_events(run.run_dir),
        data_root=run.data_root,
        compare=compare,
        confidence=run.settings.evaluation.confidence,
        max_pixels=run.settings.data.max_pixels,
    )
    if not metrics["folder"]:
        with EventLog(run.run_dir) as log:
            log.write(
                "verdict",
                met=metrics["met"],
                targets=metrics["targets"],
                metrics_path=str(metrics_path),
                report_path=str(report_path),
            )
    return metrics


def _recorded(progress: Progress, run_dir: Path) -> Progress:
    """`progress` that monitors see, too."""
    written_s = 0.0

    def update(phase: str, done: int, total: int) -> None:
        nonlocal written_s
        progress(phase, done, total)
        if time.monotonic() - written_s >= _RECORD_EVERY_S:
            written_s = time.monotonic()
            with EventLog(run_dir) as log:
                log.write("evaluation", phase=phase, done=done, total=total)

    return update


def _limits(run: Run, best: Checkpoint | None, fitted_here: bool, progress: Progress) -> Limits | None:
    """What is known of the limits of the `best` classifier's answers before the photos are seen."""
    if best is None:
        return None
    model = best.meta["files"]["ema.safetensors"]
    if fitted_here:
        return fit_to_training(run, model, progress)
    found = read_limits(run.run_dir)
    return found if found is not None and found.model == model else None


def training_time_s(run_dir: Path) -> float:
    """Seconds that the run's tasks took, over all restarts."""
    durations: dict[str, float] = {}
    for event in read_events(run_dir):
        if event["kind"] == "task" and event["status"] == "finished":
            durations[event["task"]] = event["duration_s"]
    return sum(durations.values())
