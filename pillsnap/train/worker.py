"""What runs in a Ray Train worker: Ray's context -> a job for the loop."""

from __future__ import annotations

import logging
import os
import socket
import time
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pillsnap.config import Settings
from pillsnap.data.stream import Stream, batches_of, rows_of
from pillsnap.errors import UserError
from pillsnap.storage import one_line

STREAM = "stream"


@dataclass(frozen=True)
class WorkerConfig:
    """All that a worker needs, beside its share of the stream."""

    task: str
    settings: Settings
    codes: list[str]
    run_dir: str
    meta: dict[str, Any]
    stream: Stream
    started_at_s: float
    """Unix time at which this driver began the task."""
    elapsed_before_s: float
    """Seconds that the task took under earlier drivers."""
    log_level: str = "INFO"
    uri: str = ""
    """Where the run is kept, when it is not in run_dir."""
    desk: Any = None
    """Then, the actor that takes what belongs into the run."""


def run_worker(config: WorkerConfig) -> None:
    """Train one task on this worker, from the run's last checkpoint to the end."""
    import ray
    import torch
    from ray import train as ray_train

    from pillsnap.data.decode_workers import decode_ahead
    from pillsnap.data.loader import Loader
    from pillsnap.data.malloc import keep_freed_memory
    from pillsnap.models.precision import prefer_speed
    from pillsnap.observe.events import EventLog
    from pillsnap.observe.logs import setup_logging
    from pillsnap.runs.checkpoint import only_writer
    from pillsnap.runs.directory import STOP_FILE
    from pillsnap.runs.relay_client import RemoteRun
    from pillsnap.runs.remote_checkpoints import find_run_checkpoint
    from pillsnap.tasks.registry import make_task
    from pillsnap.train.job import Job
    from pillsnap.train.loop import train

    context = ray_train.get_context()
    device = ray_train.torch.get_device()
    cores = max(1, (os.cpu_count() or 1) // context.get_local_world_size())
    if device.type == "cpu":
        keep_freed_memory()  # every step takes and frees the same large tensors: it saves a quarter of the step
        # Ray sets one thread a worker; the workers of a host share its cores.
        torch.set_num_threads(cores)
    else:
        prefer_speed()
    remote = RemoteRun(config.uri, config.task, config.desk) if config.uri else None
    run_dir = remote.run_dir if remote else Path(config.run_dir)
    send = remote.send_log if remote else None
    setup_logging(run_dir, config.log_level, rank=context.get_world_rank(), send=send)
    log = logging.getLogger(__name__)
    log.info("%s on %s, process %d, %s", config.task, socket.gethostname(), os.getpid(), device)
    folder = run_dir / "checkpoints" / config.task
    first = context.get_world_rank() == 0
    # In this order: once the lock is held no worker of an earlier start can add a checkpoint, then the stream is placed
    # at the last one (StreamFromCheckpoint, which the first worker's call sets off), and then all workers read it.
    log_of_run = (remote.take_over if remote else lambda: EventLog(run_dir)) if first else nullcontext
    with only_writer(folder) if first else nullcontext(), log_of_run() as events:
        shard = ray_train.get_dataset_shard(STREAM)
        resume, damaged = find_run_checkpoint(config.uri or run_dir, config.task, role="worker")
        plan = replace(config.stream.plan, num_workers=context.get_world_size())
        if events is not None:
            for message in damaged:
                events.write("warning", message=f"{message} The newest sound checkpoint is used instead.")
            position = resume.position if resume else None
            events.write(
                "task",
                task=config.task,
                status="started",
                epochs=plan.epochs,
                steps_per_epoch=plan.train_steps,
                batch_size=plan.batch_size,
                num_train=plan.num_train,
                num_val=plan.num_val,
                epoch=position.epoch if position else 0,
                step=position.global_step if position else 0,
            )
        job = Job(
            task=make_task(config.task, config.settings, config.codes),
            plan=plan,
            train=config.settings.train,
            data=config.settings.data,
            device=device,
            run_dir=run_dir,
            meta=config.meta | {"num_workers": plan.num_workers},
            resume=resume,
            elapsed_before_s=config.elapsed_before_s + time.time() - config.started_at_s,
            events=events,
            sample_ids=lambda numbers: ray.get(config.stream.train_samples)["sample_id"].take(numbers).to_pylist(),
            stop_requested=remote.stop_requested(first) if remote else (run_dir / STOP_FILE).exists,
            preempted=lambda: ray_train.get_preemption_info() is not None,
            report=ray_train.report,
            publish=remote.publish if remote else None,
            share=remote.share if remote else None,
        )
        if config.stream.ship_bytes:
            num_processes = config.settings.data.decoding_processes or cores
            batches = decode_ahead(rows_of(shard), replace(config.stream, plan=plan).batch_maker(), num_processes)
        else:
            batches = batches_of(shard)
        try:
            with closing(Loader(batches, device)) as loader:
                train(job, loader)
        except UserError as error:
            # A fault that another try would only repeat: the driver reads it from the log instead of restarting this
            # worker.
            if events is not None:
                events.write("failure", message=str(error))
        except Exception as error:
            log.exception("this worker stops")  # Ray tells the driver; the log keeps the traceback and the rank
            if events is not None:  # else the restart that follows would have no reason
                why = f"{type(error).__name__}: {one_line(error)}"
                events.write("warning", message=f"{config.task}: the worker stopped ({why}); train.log has the trace.")
            raise
