"""Trains one task with Ray Train: its stream, its TorchTrainer, and the signals that stop it."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import uuid
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from pillsnap.cluster.session import Workers
from pillsnap.config import Settings
from pillsnap.data.fill_store import room_for, split_stores, store_folder
from pillsnap.data.recipes import Recipe
from pillsnap.data.samples import TaskSamples
from pillsnap.data.stream import Stream, share_samples, warm_up_reading
from pillsnap.observe.logs import current_level
from pillsnap.observe.versions import versions
from pillsnap.photos.reader import PhotoReader
from pillsnap.runs.directory import STOP_FILE, Run
from pillsnap.runs.elapsed import ElapsedTime
from pillsnap.storage import is_uri
from pillsnap.tasks.stores import too_small
from pillsnap.tracking.task_run import wandb_id
from pillsnap.train.schedule.epochs import stream_plan
from pillsnap.train.schedule.time_budget import TimeBudget
from pillsnap.train.worker import STREAM, WorkerConfig, run_worker

if TYPE_CHECKING:  # Ray reads its environment at import: session.py sets it first
    from ray.train.torch import TorchTrainer

_FEW_CPUS = 4


def make_trainer(
    run: Run,
    name: str,
    stream: Stream,
    workers: Workers,
    elapsed: ElapsedTime,
    relay: Any = None,
    budget: TimeBudget | None = None,
) -> TorchTrainer:
    """Ray Train's trainer for task `name`; `relay` is that of a remote run."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from pillsnap.train.data_config import StreamFromCheckpoint, placeholder

    train = run.settings.train
    # Ray Train reads these from the driver's environment only.
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(train.hang_timeout_s)
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # a dead worker is replaced that much later
    worker = WorkerConfig(
        task=name,
        settings=run.settings,
        codes=run.codes,
        run_dir=str(run.run_dir),
        meta=checkpoint_meta(run, name),
        stream=stream,
        started_at_s=elapsed.started_at_s,
        elapsed_before_s=elapsed.before_s,
        log_level=current_level(),
        uri=run.uri,
        relay=relay,
        budget=budget,
    )
    resources = {"CPU": train.cpus_per_worker} | ({"GPU": 1} if workers.use_gpu else {})
    fixed = workers.least == workers.most
    return TorchTrainer(
        run_worker,
        train_loop_config=worker,
        torch_config=TorchConfig(timeout_s=round(train.hang_timeout_s)),
        scaling_config=ScalingConfig(
            num_workers=workers.most if fixed else (workers.least, workers.most),
            use_gpu=workers.use_gpu,
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            # A unique name: Ray Train would restore an earlier run of the same name, but the checkpoints are ours.
            name=f"{name}-{uuid.uuid4().hex[:8]}",
            storage_path=str(run.run_dir / "ray"),
            failure_config=FailureConfig(max_failures=train.max_failures),
        ),
        datasets={STREAM: placeholder},
        dataset_config=StreamFromCheckpoint(stream, run.where, name, train.cpus_per_worker),
    )


def checkpoint_meta(run: Run, name: str) -> dict[str, Any]:
    """What every checkpoint of task `name` says about its run."""
    return {
        "task": name,
        "config": run.settings.model_dump(mode="json"),
        "codes": run.codes,
        "manifest_hash": run.manifest_hash,
        "run_id": run.run_id,
        "wandb_id": wandb_id({"run_id": run.run_id}, name),
        "versions": versions(),
    }


def make_stream(run: Run, name: str, samples: TaskSamples, recipe: Recipe, *, read_only: bool = False) -> Stream:
    """The stream of task `name`, with its samples in the object store. Its plan is for one worker; StreamFromCheckpoint
    changes that at each start of the workers. `read_only`: it adds nothing to the store.
    """
    data = run.settings.data
    ship_bytes = _decodes_in_workers(run.settings)
    if ship_bytes:
        warm_up_reading()
    folder = store_folder(data.store_dir, run.where)
    stores = {}
    if data.store != "off":
        stores = split_stores(folder, name, recipe, data.store, run.manifest_hash, read_only=read_only)
    return Stream(
        plan=stream_plan(getattr(run.settings, name), run.settings.train.seed, samples),
        recipe=recipe,
        reader=PhotoReader(run.data_root, data.max_pixels),
        train_samples=share_samples(samples.train),
        val_samples=share_samples(samples.val),
        batches_per_read=data.batches_per_read,
        decoding_cpus=data.decoding_cpus,
        train_store=stores.get("train"),
        val_store=stores.get("val"),
        ship_bytes=ship_bytes,
        ship_stored=not _all_workers_read(folder),
    )


def within_room(stream: Stream, samples: TaskSamples, folder: str) -> tuple[Stream, str]:
    """The stream, and a message if the disk has no room for its store in `folder`: then nothing is added to the store.

    The samples stay the same: windows that are not kept are encoded and decoded all the same.
    """
    train, val = stream.train_store, stream.val_store
    if train is None or val is None:
        return stream, ""
    room = room_for([(train, samples.train), (val, samples.val)], folder, stream.reader)
    if room.is_enough:
        return stream, ""
    stream = replace(stream, train_store=replace(train, read_only=True), val_store=replace(val, read_only=True))
    return stream, f"{too_small(room)} Its windows are made anew in each epoch."


def _decodes_in_workers(settings: Settings) -> bool:
    data = settings.data
    if data.decode_in != "auto":
        return data.decode_in == "workers"
    import ray

    resources = ray.cluster_resources()
    uses_gpu = resources.get("GPU") and settings.train.device != "cpu"
    return data.store != "off" and not uses_gpu and resources.get("CPU", 0) <= _FEW_CPUS


def _all_workers_read(folder: str) -> bool:
    """Whether every worker can read the store in that folder."""
    import ray

    return is_uri(folder) or sum(node["Alive"] for node in ray.nodes()) == 1


def fit(trainer: TorchTrainer, run_dir: Path, elapsed: ElapsedTime) -> None:
    """Run the trainer in a thread, so that this one receives signals: the first SIGINT or SIGTERM requests a checkpoint
    and a stop, a second one stops at once.
    """
    failure: list[BaseException] = []

    def run_trainer() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run_trainer, name="train", daemon=True)

    def request_stop(signum: int, _: FrameType | None) -> None:
        if (run_dir / STOP_FILE).exists():
            raise KeyboardInterrupt
        (run_dir / STOP_FILE).write_text(signal.Signals(signum).name)

    before = {signum: signal.signal(signum, request_stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        thread.start()
        while thread.is_alive():
            thread.join(timeout=0.2)
            elapsed.tick()
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        shutil.rmtree(run_dir / "ray", ignore_errors=True)
    if failure:
        raise failure[0]
