"""The one training loop, run in every Ray Train worker. It knows batches, not Ray Data, and reports by callbacks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pillsnap.config import DataSettings, TrainSettings
from pillsnap.data.loader import DeviceBatch
from pillsnap.data.plan import StreamPlan
from pillsnap.errors import UserError
from pillsnap.observe.events import EventLog
from pillsnap.train.checkpoint import Checkpoint, Position
from pillsnap.train.examples import draw_examples
from pillsnap.train.memory import MEMORY_FILE, MicroBatches
from pillsnap.train.meters import RunningMean, Throughput
from pillsnap.train.peers import Peers
from pillsnap.train.saver import Saver
from pillsnap.train.schedule import learning_rate
from pillsnap.train.state import TrainingState
from pillsnap.train.task_log import TaskLog
from pillsnap.train.tasks import Task

_MAX_BAD_STEPS = 3
_IDS_NAMED = 40


@dataclass
class Job:
    """What one worker trains, and where it writes. Only the worker of rank 0 has an event log."""

    task: Task
    plan: StreamPlan
    train: TrainSettings
    data: DataSettings
    device: torch.device
    run_dir: Path
    meta: dict[str, Any]
    """Goes into every checkpoint: config, codes, manifest hash, versions."""
    resume: Checkpoint | None
    elapsed_before_s: float
    """Seconds that the task took before this worker began."""
    events: EventLog | None
    sample_ids: Callable[[list[int]], list[str]]
    """Names of training samples, for messages."""
    stop_requested: Callable[[], bool]
    preempted: Callable[[], bool]
    """Whether a node is about to be taken away; asked by every worker at the same steps."""
    report: Callable[[dict[str, float]], None]
    """Called by every worker once an epoch, after its checkpoint is on disk."""


def train(job: Job, batches: Iterator[DeviceBatch]) -> Position:
    """Train from the job's position to the end, or until a stop is requested. Returns where it stands."""
    plan, settings, task = job.plan, job.task.settings, job.task
    position = job.resume.position if job.resume else Position()
    peers = Peers(job.device)
    remembered = job.resume.trainer_state().get("progress", {}) if job.resume else {}
    log = TaskLog(job, peers, remembered)
    memory = MicroBatches(task.name, plan.worker_batch_size, peers, job.run_dir / MEMORY_FILE, log.warn)
    state = TrainingState(task, job.train, job.device, peers, memory, job.resume)
    for note in state.notes:
        log.warn(note)
    done = position.epoch * plan.num_train + position.epoch_step * plan.batch_size
    meter = Throughput(plan.epochs * plan.num_train - done)
    bad: list[str] = []
    """The steps in a row, up to this one, that had no finite gradient, with their samples."""
    losses_so_far = RunningMean(remembered)

    with closing(Saver(job, peers, state, log)) as saver:
        for epoch in range(position.epoch, plan.epochs):
            # --- training ---------------------------------------------------------------------------------------------
            first_step = position.epoch_step if epoch == position.epoch else 0
            meter.start_epoch()
            for step in range(first_step, plan.train_steps):
                batch = _next(batches, epoch, True, step)
                num_samples = plan.samples_in_step(True, step)
                lr = learning_rate(
                    position.global_step,
                    base=settings.lr,
                    total_steps=plan.epochs * plan.train_steps,
                    warmup_steps=round(settings.warmup_epochs * plan.train_steps),
                    final_fraction=settings.final_lr_fraction,
                )
                losses, gradient_norm = state.step(batch, lr, num_samples, position.global_step)
                position = Position(epoch, step + 1, position.global_step + 1)
                meter.step(num_samples, batch)
                log.seen(batch)

                if torch.isfinite(gradient_norm):
                    bad = []
                else:
                    ids = peers.gather(job.sample_ids([int(i) for i in batch.index if i >= 0]))
                    more = f" and {len(ids) - _IDS_NAMED} more" if len(ids) > _IDS_NAMED else ""
                    bad.append(f"step {position.global_step}: {', '.join(ids[:_IDS_NAMED])}{more}")
                    log.warn(f"{task.name}: the loss or its gradient is not finite; no update was made at {bad[-1]}.")
                if len(bad) >= _MAX_BAD_STEPS:
                    raise UserError(
                        f"{task.name} stopped at step {position.global_step}: {len(bad)} steps in a row had a loss or "
                        f"gradient that is not finite. Lower {task.name}.lr or look at these samples. {'; '.join(bad)}."
                    )
                if position.global_step % job.train.log_every_steps == 0 or step + 1 == plan.train_steps:
                    mean = dict(zip(losses, peers.sum(torch.stack(list(losses.values()))), strict=True))
                    losses_so_far.add(sum(mean.values()))
                    log.write(
                        "step", epoch=epoch + 1, step=position.global_step, loss=sum(mean.values()), losses=mean, lr=lr,
                        gpu_memory_bytes=torch.cuda.max_memory_allocated() if job.device.type == "cuda" else None,
                        **meter.figures(),
                    )  # fmt: skip
                    log.flush_quarantine()
                wishes = saver.wishes()
                if wishes.any and not bad:  # a checkpoint of a bad step would skip it for good
                    saver.save(position, losses_so_far.remembered | log.remembered, best=False)
                    if wishes.stop:
                        saver.fence()
                        return position
            log.write(
                "epoch",
                epoch=epoch + 1,
                step=position.global_step,
                loss=losses_so_far.mean,
                **meter.epoch_figures(),
            )

            # --- validation -------------------------------------------------------------------------------------------
            validation_start_s = time.monotonic()
            facts: list[Any] = []
            with torch.inference_mode(), state.evaluating():
                for step in range(plan.val_steps):
                    batch = _next(batches, epoch, False, step)
                    found = [fact for part in memory.parts(batch) for fact in task.validate(state.ema.module, part)]
                    facts += found
                    log.seen(batch)
                    if step == 0 and job.events:
                        path = draw_examples(task, batch, found, job.run_dir, epoch + 1)
                        log.write("examples", epoch=epoch + 1, path=str(path.relative_to(job.run_dir)))
                    wishes = saver.wishes()
                    if wishes.any and not bad:
                        trained = Position(epoch, plan.train_steps, position.global_step)
                        saver.save(trained, losses_so_far.remembered | log.remembered, best=False)
                        if wishes.stop:
                            saver.fence()
                            return trained
            log.flush_quarantine()
            metrics = task.score(peers.gather(facts))
            best = state.is_best(metrics[task.best_metric])
            log.write(
                "validation", epoch=epoch + 1, step=position.global_step, metrics=metrics, best=best,
                duration_s=time.monotonic() - validation_start_s,
            )  # fmt: skip

            # --- checkpoint -------------------------------------------------------------------------------------------
            position = Position(epoch + 1, 0, position.global_step)
            losses_so_far = RunningMean()
            saver.save(position, log.remembered, best=best, metrics=metrics)
            if saver.wishes().stop and epoch + 1 < plan.epochs:
                break
        saver.fence()
    return position


def _next(batches: Iterator[DeviceBatch], epoch: int, training: bool, step: int) -> DeviceBatch:
    batch = next(batches)
    place = (batch.epoch, batch.training, batch.step)
    assert place == (epoch, training, step), f"the stream is at {place}, the loop at {(epoch, training, step)}"
    return batch
