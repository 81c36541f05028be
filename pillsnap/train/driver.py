"""The driver of a run: trains detection, boxes unlabelled pills, trains classification, evaluates."""

from __future__ import annotations

import contextlib
import json
import logging
from typing import Any

from rich.console import Console

from pillsnap.cluster.node_checks import node_checks, require_alike
from pillsnap.cluster.preflight import disk_check, gpu_checks
from pillsnap.cluster.session import Workers, count_workers, ray_session
from pillsnap.data.fill_store import store_folder
from pillsnap.data.malloc import return_freed_memory
from pillsnap.data.samples import TaskSamples
from pillsnap.errors import UserError
from pillsnap.evaluate.evaluator import evaluate_run
from pillsnap.files import write_json
from pillsnap.manifest.audit.quick import reasons_not_to_train
from pillsnap.observe.events import EventLog, read_events
from pillsnap.observe.node_telemetry import NodeTelemetry
from pillsnap.observe.progress import ProgressView
from pillsnap.observe.versions import versions
from pillsnap.observe.work_progress import progress_bar
from pillsnap.runs.directory import FOUND_BOXES_FILE, STOP_FILE, Run, only_driver
from pillsnap.runs.elapsed import ElapsedTime
from pillsnap.runs.extension import awaits_validation, is_trained
from pillsnap.runs.relay import flush_relay, start_relay
from pillsnap.runs.remote_checkpoints import find_run_checkpoint
from pillsnap.storage import join
from pillsnap.tasks.base import Task
from pillsnap.tasks.best_model import load_best
from pillsnap.tasks.registry import make_task
from pillsnap.tracking.mirror import WandbMirror
from pillsnap.train.faults.diagnosis import diagnose
from pillsnap.train.pseudo_labels import photos_without_boxes, predict_boxes
from pillsnap.train.readiness import require_train_samples
from pillsnap.train.schedule.epochs import notes
from pillsnap.train.schedule.time_budget import task_budget
from pillsnap.train.trainer import fit, make_stream, make_trainer, within_room

_log = logging.getLogger(__name__)


class RunStopped(Exception):
    """The run stopped on request and left a checkpoint; the message says where."""


def train_and_evaluate(run: Run, console: Console) -> dict[str, Any]:
    """Train the tasks that are not trained yet, evaluate, and return the metrics.

    Raises RunStopped after a requested stop and UserError with the reason after a failure; the last checkpoint stays.
    """
    with only_driver(run.run_dir):
        try:
            return _train_and_evaluate(run, console)
        except (RunStopped, UserError):
            raise
        except Exception as error:  # Ray did not start, or did not shut down
            raise _explained(run, error) from error


def _train_and_evaluate(run: Run, console: Console) -> dict[str, Any]:
    wandb = run.settings.wandb

    def print_line(line: str) -> None:
        console.out(line, highlight=False)

    with ray_session(), start_relay(run.uri, run.run_dir) as relay, EventLog(run.run_dir) as events:
        mirror = WandbMirror(
            run.run_dir,
            wandb.project,
            run.run_id,
            wandb.mode,
            on_warning=lambda message: events.write("warning", message=message),
            say=print_line,
        )
        with mirror:
            try:
                with ProgressView(run.run_dir, console), NodeTelemetry(events, run.run_dir):
                    train_run(run, relay)
                print_line("evaluating: both models over the validation photos")
                with progress_bar("evaluating", console) as progress:
                    return evaluate_run(run, progress=progress)
            except RunStopped:
                raise
            except Exception as error:
                raise _explained(run, error) from error


def _explained(run: Run, error: Exception) -> UserError:
    """What happened, the likely cause and what to do; written to the event log unless a worker has reported it."""
    diagnosis = diagnose(error, folder=run.run_dir)
    latest = next((e for e in reversed(read_events(run.run_dir)) if e["kind"] in ("failure", "run", "task")), None)
    if latest is None or latest["kind"] != "failure":
        with contextlib.suppress(OSError), EventLog(run.run_dir) as events:  # the disk may be what failed
            events.write("failure", message=diagnosis.message, cause=diagnosis.cause, advice=diagnosis.advice)
    if not isinstance(error, UserError):
        _log.error("the run ends", exc_info=error, extra={"file_only": True})
    return UserError(str(diagnosis))


def train_run(run: Run, relay: Any = None) -> None:
    """Train the tasks that are not trained yet. Ray must be up; `relay` is that of a remote run. Raises RunStopped
    after a requested stop, UserError after a failure.
    """
    assert bool(relay) == bool(run.uri)
    (run.run_dir / STOP_FILE).unlink(missing_ok=True)
    data = run.settings.data
    reasons = reasons_not_to_train(run.manifest, run.data_root, data.max_pixels, data.quarantine_fraction)
    if reasons:
        raise UserError(f"The manifest is not fit to train on: {'; '.join(reasons)}. Run `pillsnap manifest validate`.")
    workers = count_workers(run.settings)
    require_alike(node_checks(run.settings, run.where, run.data_root, run.manifest))
    with EventLog(run.run_dir) as events:
        events.write(
            "run",
            run_id=run.run_id,
            name=run.settings.name,
            stage=run.settings.stage,
            config=run.settings.model_dump(mode="json"),
            manifest_hash=run.manifest_hash,
            num_workers=workers.most if workers.least == workers.most else str(workers),
            versions=versions(),
        )
        checks = [] if run.settings.train.device == "cpu" else gpu_checks()
        for check in (*checks, disk_check(run.run_dir)):
            if check.ok is False:
                events.write("warning", message=f"{check.name}: {check.found}: {check.advice}")
        for name in run.settings.tasks:
            _train_task(run, name, workers, events, relay)


def _train_task(run: Run, name: str, workers: Workers, events: EventLog, relay: Any) -> None:
    task = make_task(name, run.settings, run.codes)
    folder = run.checkpoint_dir(name)
    last, _ = find_run_checkpoint(run.where, name, role="driver")
    if last is not None and "from_run" in last.meta:
        events.write("initial_weights", task=name, **last.meta["from_run"])
    elapsed = ElapsedTime(folder, last.meta["elapsed_s"] if last else 0.0)
    if not is_trained(last, task.settings.epochs):
        budget = task_budget(run, name)
        found_boxes = _boxes_for_unlabelled(run, events) if name == "classification" else None
        samples = task.samples(run.manifest, found_boxes)
        _check_samples(task, samples, events)
        stream = make_stream(run, name, samples, task.recipe(samples))
        stream, no_room = within_room(stream, samples, store_folder(run.settings.data.store_dir, run.where))
        if no_room:
            events.write("warning", message=f"{name}: {no_room}")
        del samples  # the stream holds them in the object store
        return_freed_memory()
        for _ in range(2):  # the second start validates alone
            try:
                fit(make_trainer(run, name, stream, workers, elapsed, relay, budget), run.run_dir, elapsed)
            except Exception as error:  # Ray raises whatever its parts raise
                raise _explained(run, error) from error
            last, _ = find_run_checkpoint(run.where, name, role="driver")
            if not awaits_validation(last, task.settings.epochs):
                break
        if not is_trained(last, task.settings.epochs):
            raise _why_unfinished(run, name, last.position.epoch if last else 0, elapsed.started_at_s)
    elif run.export_path(name).exists() and _is_finished(run, name):
        events.write("task", task=name, status="skipped")
        return
    assert last is not None
    best = load_best(run.where, name, run.settings, run.codes, "driver")
    if best is None:
        raise UserError(
            f"{name} has no best model: the validation loss of every epoch was not finite. Train again in another "
            f"directory with a lower {name}.lr or with train.amp=off."
        )
    best.task.export(best.model, run.export_path(name), best.metrics)
    if relay:
        flush_relay(relay)
    events.write(
        "task",
        task=name,
        status="finished",
        duration_s=last.meta["elapsed_s"],
        epoch=last.position.epoch,
        step=last.position.global_step,
    )


def _is_finished(run: Run, name: str) -> bool:
    """Whether the log ends with the task's end: a driver may have died between the export and that event."""
    latest = next((e for e in reversed(read_events(run.run_dir)) if e["kind"] == "task" and e["task"] == name), None)
    return latest is not None and latest["status"] != "started"


def _check_samples(task: Task, samples: TaskSamples, events: EventLog) -> None:
    name = task.name
    for reason, count in samples.left_out.items():
        if count:
            events.write("warning", message=f"{name} leaves out {count} {reason}.")
    require_train_samples(name, samples)
    for note in notes(name, task.settings, samples):
        events.write("warning", message=note)
    if not len(samples.val):
        events.write(
            "warning",
            message=f"{name} has no validation sample: its best checkpoint is the first, and its metrics are 0.",
        )


def _boxes_for_unlabelled(run: Run, events: EventLog) -> dict[str, list]:
    """Detector boxes for unlabelled pills, kept in the run directory so that a resumed run has the same crops."""
    photos = photos_without_boxes(run.manifest)
    if not len(photos):
        return {}
    path = run.run_dir / FOUND_BOXES_FILE
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    if run.uri:
        find_run_checkpoint(run.where, "detection", "best", "driver")  # fetches the pointer
    if not (run.checkpoint_dir("detection") / "best.json").exists():
        events.write(
            "warning",
            message=f"{len(photos)} photos have unlabelled pills, left out because there is no detector to box them.",
        )
        return {}
    found = predict_boxes(photos, run.where, run.settings, run.data_root)
    write_json(path, found)
    boxed = sum(box is not None for boxes in found.values() for box in boxes)
    events.write("warning", message=f"The detector boxed {boxed} pills in {len(photos)} photos with unlabelled pills.")
    return found


def _why_unfinished(run: Run, name: str, epoch: int, started_at_s: float) -> Exception:
    if (run.run_dir / STOP_FILE).exists():
        (run.run_dir / STOP_FILE).unlink()
        folder = join(run.where, f"checkpoints/{name}")
        return RunStopped(f"{name} stopped in epoch {epoch + 1}; its last checkpoint is in {folder}.")
    failures = [
        event for event in read_events(run.run_dir) if event["kind"] == "failure" and event["time"] >= started_at_s
    ]
    return UserError(
        failures[-1]["message"]
        if failures
        else f"{name} ended after epoch {epoch}, before its last one, without a reported reason."
    )
