"""The function that runs in each Ray Train worker: builds the loop's Job from Ray's context."""

from __future__ import annotations

import logging
import os
import socket
import time
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pillsnap.config import Settings
from pillsnap.data.plan import StreamPlan
from pillsnap.data.stream import Stream
from pillsnap.errors import UserError
from pillsnap.observe.events import EventSink
from pillsnap.processes import without_garbage_collection
from pillsnap.runs.extension import last_epoch
from pillsnap.storage import one_line

if TYPE_CHECKING:  # torch and Ray load in `run_worker`: Ray's controller also imports this module
    import torch

    from pillsnap.runs.checkpoint import Checkpoint
    from pillsnap.train.schedule.time_budget import TimeBudget

STREAM = "stream"
"""Name of the workers' dataset."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerConfig:
    """Everything a worker needs besides its shard of the stream."""

    task: str
    settings: Settings
    codes: list[str]
    run_dir: str
    meta: dict[str, Any]
    stream: Stream
    started_at_s: float
    """Unix time at which this driver started the task."""
    elapsed_before_s: float
    """Seconds that the task took under earlier drivers."""
    log_level: str = "INFO"
    uri: str = ""
    """URI of the run when it is kept in remote storage; `run_dir` is then the driver's copy."""
    relay: Any = None
    """Handle of the remote run's relay."""
    budget: TimeBudget | None = None
    """The time that the task may take."""


def run_worker(config: WorkerConfig) -> None:
    """Train one task on this worker, from the run's last checkpoint to the end."""
    import ray
    from ray import train as ray_train

    from pillsnap.observe.logs import setup_logging
    from pillsnap.runs.backend import connect

    context = ray_train.get_context()
    rank, device = context.get_world_rank(), ray_train.torch.get_device()
    cores = max(1, (os.cpu_count() or 1) // context.get_local_world_size())
    _tune(device, cores)
    backend = connect(config.run_dir, config.uri, config.relay, task=config.task, rank=rank)
    setup_logging(backend.run_dir, config.log_level, rank=rank, send=backend.send_log)
    _log.info("%s on %s, process %d, %s", config.task, socket.gethostname(), os.getpid(), device)
    # In this order: rank 0 excludes writers of earlier starts, then its call of get_dataset_shard starts the stream at
    # the last checkpoint (StreamFromCheckpoint), and then every worker reads that checkpoint.
    with backend.become_writer() if rank == 0 else nullcontext() as events:
        shard = ray_train.get_dataset_shard(STREAM)
        stream = replace(config.stream, plan=replace(config.stream.plan, num_workers=context.get_world_size()))
        batches = stream.batches(shard, config.settings.data.decoding_processes or cores)
        # The stream starts while these imports take seconds.
        with without_garbage_collection():
            from pillsnap.data.loader import Loader
            from pillsnap.tasks.registry import make_task
            from pillsnap.train.job import Job
            from pillsnap.train.loop import train

        resume, damaged = backend.last_checkpoint()
        if events is not None:
            _write_start(events, config.task, stream.plan, resume, damaged)
        job = Job(
            task=make_task(config.task, config.settings, config.codes, untrained=resume is not None),
            plan=stream.plan,
            train=config.settings.train,
            data=config.settings.data,
            device=device,
            backend=backend,
            meta=config.meta | {"num_workers": stream.plan.num_workers},
            resume=resume,
            elapsed_before_s=config.elapsed_before_s + time.time() - config.started_at_s,
            events=events,
            sample_ids=lambda numbers: ray.get(stream.train_samples)["sample_id"].take(numbers).to_pylist(),
            preempted=lambda: ray_train.get_preemption_info() is not None,
            report=ray_train.report,
            budget=config.budget,
        )
        try:
            with closing(Loader(batches, device)) as loader:
                train(job, loader)
        except UserError as error:
            # A restart would repeat it: the driver reads the failure from the event log.
            if events is not None:
                events.write("failure", message=str(error))
        except Exception as error:
            _log.exception("this worker stops")
            if events is not None:
                reason = f"{type(error).__name__}: {one_line(error)}"
                events.write(
                    "warning", message=f"{config.task}: the worker stopped ({reason}); train.log has the trace."
                )
            raise


def _tune(device: torch.device, cores: int) -> None:
    import torch

    from pillsnap.data.malloc import keep_freed_memory
    from pillsnap.models.precision import prefer_speed

    if device.type == "cpu":
        keep_freed_memory()  # each step allocates and frees the same large tensors
        torch.set_num_threads(cores)  # Ray sets one thread per worker
    else:
        prefer_speed()


def _write_start(events: EventSink, task: str, plan: StreamPlan, resume: Checkpoint | None, damaged: list[str]) -> None:
    for message in damaged:
        events.write("warning", message=f"{message} The newest sound checkpoint is used instead.")
    events.write(
        "task",
        task=task,
        status="started",
        epochs=last_epoch(resume, plan.epochs) if resume else plan.epochs,
        steps_per_epoch=plan.train_steps,
        batch_size=plan.batch_size,
        num_train=plan.num_train,
        num_val=plan.num_val,
        samples_per_epoch=plan.epoch_samples,
        combinations_per_epoch=plan.combinations_per_epoch,
        validate_every=plan.validate_every,
        epoch=resume.position.epoch if resume else 0,
        step=resume.position.global_step if resume else 0,
    )
