"""The driver of a run: detection -> boxes for unlabelled pills -> classification."""

from __future__ import annotations

import json
import platform
import shutil
import signal
import threading
import time
import uuid
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from pillsnap.data.batches import PhotoReader
from pillsnap.data.manifest import write_json
from pillsnap.data.plan import StreamPlan
from pillsnap.data.samples import TaskSamples
from pillsnap.data.stream import Recipe, Stream, execution_options, share_samples
from pillsnap.errors import UserError
from pillsnap.observe.events import EventLog, read_events
from pillsnap.train.run_directory import STOP_FILE, Run
from pillsnap.train.session import count_workers
from pillsnap.train.worker import STREAM, WorkerConfig, run_worker

if TYPE_CHECKING:
    import ray
    from ray.train.torch import TorchTrainer

FOUND_BOXES_FILE = "found_boxes.json"
_PACKAGES = ("pillsnap", "ray", "torch", "torchvision", "ultralytics", "timm", "numpy", "pyarrow", "opencv-python-headless", "kornia-rs")


class RunStopped(Exception):
    """The run was asked to stop and left a checkpoint; the message says where."""


def train_run(run: Run) -> None:
    """Train what is not trained yet. Ray must be up. Raises RunStopped when a stop was asked for, UserError when it failed."""
    (run.run_dir / STOP_FILE).unlink(missing_ok=True)
    num_workers, use_gpu = count_workers(run.settings)
    with EventLog(run.run_dir) as events:
        events.write(
            "run",
            run_id=run.run_id,
            name=run.settings.name,
            stage=run.settings.stage,
            config=run.settings.model_dump(mode="json"),
            manifest_hash=run.manifest_hash,
            num_workers=num_workers,
            versions=versions(),
        )
        for name in run.settings.tasks:
            _train_task(run, name, num_workers, use_gpu, events)


def training_time_s(run_dir: Path) -> float:
    """Seconds that the run's tasks took, over all restarts."""
    durations: dict[str, float] = {}
    for event in read_events(run_dir):
        if event["kind"] == "task" and event["status"] == "finished":
            durations[event["task"]] = event["duration_s"]
    return sum(durations.values())


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the figures."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _train_task(run: Run, name: str, num_workers: int, use_gpu: bool, events: EventLog) -> None:
    from pillsnap.train.best import load_best
    from pillsnap.train.checkpoint import find_checkpoint
    from pillsnap.train.tasks import make_task

    started_at_s = time.time()
    task = make_task(name, run.settings, run.codes)
    folder = run.checkpoint_dir(name)
    last, _ = find_checkpoint(folder)
    if last is None or last.position.epoch < task.settings.epochs:
        found_boxes = _boxes_for_unlabelled(run, events) if name == "classification" else None
        samples = task.samples(run.manifest, found_boxes)
        _check_samples(name, samples, events)
        stream = _stream(run, name, samples, task.recipe(samples), num_workers)
        _fit(_trainer(run, name, stream, num_workers, use_gpu, started_at_s), run.run_dir)
        last, _ = find_checkpoint(folder)
        if last is None or last.position.epoch < task.settings.epochs:
            _explain_unfinished(run, name, last.position.epoch if last else 0, started_at_s)
    elif run.export_path(name).exists():
        events.write("task", task=name, status="skipped")
        return
    assert last is not None
    best = load_best(run.run_dir, name, run.settings, run.codes)
    assert best is not None
    best[0].export(best[1], run.export_path(name))
    events.write("task", task=name, status="finished", duration_s=last.meta["elapsed_s"], epoch=last.position.epoch, step=last.position.global_step)


def _trainer(run: Run, name: str, stream: Stream, num_workers: int, use_gpu: bool, started_at_s: float) -> TorchTrainer:
    from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    train = run.settings.train
    meta = {
        "task": name,
        "config": run.settings.model_dump(mode="json"),
        "codes": run.codes,
        "manifest_hash": run.manifest_hash,
        "run_id": run.run_id,
        "versions": versions(),
    }
    worker = WorkerConfig(name, run.settings, run.codes, str(run.run_dir), meta, stream, started_at_s)
    resources = {"CPU": train.cpus_per_worker} | ({"GPU": 1} if use_gpu else {})
    return TorchTrainer(
        run_worker,
        train_loop_config=worker,  # type: ignore[arg-type]  # handed through as it is
        scaling_config=ScalingConfig(num_workers=num_workers, use_gpu=use_gpu, resources_per_worker=resources),
        run_config=RunConfig(
            # Ray Train takes up an earlier run of the same name; the checkpoints that count are ours, so each start has its own.
            name=f"{name}-{uuid.uuid4().hex[:8]}",
            storage_path=str(run.run_dir / "ray"),
            failure_config=FailureConfig(max_failures=train.max_failures),
        ),
        datasets={STREAM: StreamFromCheckpoint(stream, run.checkpoint_dir(name))},  # type: ignore[dict-item]  # a callable
        dataset_config=DataConfig(execution_options=execution_options()),
    )


@dataclass(frozen=True)
class StreamFromCheckpoint:
    """Called at every start of the workers: the stream from where the last checkpoint stands."""

    stream: Stream
    folder: Path

    def __call__(self) -> ray.data.Dataset:
        from pillsnap.train.checkpoint import find_checkpoint

        last, _ = find_checkpoint(self.folder)
        if last is None:
            return self.stream.dataset()
        return self.stream.dataset(self.stream.plan.first_slot(last.position.epoch, last.position.epoch_step))


def _stream(run: Run, name: str, samples: TaskSamples, recipe: Recipe, num_workers: int) -> Stream:
    settings = getattr(run.settings, name)
    return Stream(
        plan=StreamPlan(
            seed=run.settings.train.seed,
            epochs=settings.epochs,
            num_train=len(samples.train),
            num_val=len(samples.val),
            batch_size=settings.batch_size,
            num_workers=num_workers,
        ),
        recipe=recipe,
        reader=PhotoReader(run.data_root, run.settings.data.max_pixels),
        train_samples=share_samples(samples.train),
        val_samples=share_samples(samples.val),
        batches_per_read=run.settings.data.batches_per_read,
        decoding_cpus=run.settings.data.decoding_cpus,
    )


def _check_samples(name: str, samples: TaskSamples, events: EventLog) -> None:
    for reason, count in samples.left_out.items():
        if count:
            events.write("warning", message=f"{name} leaves out {count} {reason}.")
    if not len(samples.train):
        raise UserError(f"The manifest has no photo that {name} can be trained on; look at it with `pillsnap manifest validate`.")
    if not len(samples.val):
        events.write("warning", message=f"{name} has no validation sample: its best checkpoint is the first, and its figures are 0.")


def _boxes_for_unlabelled(run: Run, events: EventLog) -> dict[str, list]:
    """Detector boxes for pills without one, remembered beside the run so that a resumed run sees the same crops."""
    from pillsnap.train.boxes import find_boxes, photos_without_boxes

    photos = photos_without_boxes(run.manifest)
    if not len(photos):
        return {}
    path = run.run_dir / FOUND_BOXES_FILE
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    if not (run.checkpoint_dir("detection") / "best.json").exists():
        events.write("warning", message=f"{len(photos)} photos have unlabelled pills and there is no detector to box them: those pills are left out.")
        return {}
    found = find_boxes(photos, run.run_dir, run.settings, run.data_root)
    write_json(path, found)
    boxed = sum(box is not None for boxes in found.values() for box in boxes)
    events.write("warning", message=f"The detector boxed {boxed} pills in {len(photos)} photos with unlabelled pills.")
    return found


def _fit(trainer: TorchTrainer, run_dir: Path) -> None:
    """Train in a thread of its own, so that this one hears signals: the first asks for a checkpoint and an end, a second insists."""
    failure: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=fit, name="train", daemon=True)

    def ask_to_stop(signum: int, _: FrameType | None) -> None:
        if (run_dir / STOP_FILE).exists():
            raise KeyboardInterrupt
        (run_dir / STOP_FILE).write_text(signal.Signals(signum).name)

    before = {signum: signal.signal(signum, ask_to_stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        thread.start()
        while thread.is_alive():
            thread.join(timeout=0.2)
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        shutil.rmtree(run_dir / "ray", ignore_errors=True)
    if failure:
        raise _as_user_error(failure[0]) from failure[0]


def _explain_unfinished(run: Run, name: str, epoch: int, started_at_s: float) -> None:
    if (run.run_dir / STOP_FILE).exists():
        (run.run_dir / STOP_FILE).unlink()
        raise RunStopped(f"{name} stopped in epoch {epoch + 1}; its checkpoint is in {run.checkpoint_dir(name)}.")
    failures = [event for event in read_events(run.run_dir) if event["kind"] == "failure" and event["time"] >= started_at_s]
    raise UserError(failures[-1]["message"] if failures else f"{name} ended after epoch {epoch}, before its last one, without saying why.")


def _as_user_error(error: BaseException) -> Exception:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    last: Any = lines[-1] if lines else type(error).__name__
    return UserError(f"Training failed: {last}")
