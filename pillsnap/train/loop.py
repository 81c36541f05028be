"""The one training loop, run in every Ray Train worker. It knows batches, not Ray Data, and reports by callbacks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pillsnap.data.loader import DeviceBatch
from pillsnap.errors import UserError
from pillsnap.runs.checkpoint import Position
from pillsnap.runs.directory import MEMORY_FILE
from pillsnap.train.checkpoint_writer import Saver
from pillsnap.train.collectives import Peers
from pillsnap.train.device_readback import Readings
from pillsnap.train.examples import draw_examples
from pillsnap.train.job import Job
from pillsnap.train.lr_schedule import learning_rate
from pillsnap.train.meters import RunningMean, Throughput
from pillsnap.train.microbatch import MicroBatches
from pillsnap.train.state import Step, TrainingState
from pillsnap.train.task_log import TaskLog

_MAX_BAD_STEPS = 3
_IDS_NAMED = 40


def train(job: Job, batches: Iterator[DeviceBatch]) -> Position:
    """Train from the job's position to the end, or until a stop is requested. Returns where it stands."""
    plan, settings, task = job.plan, job.task.settings, job.task
    position = job.resume.position if job.resume else Position()
    peers = Peers(job.device)
    remembered = job.resume.trainer_state().get("progress", {}) if job.resume else {}
    log = TaskLog(job, peers, remembered)
    memory = MicroBatches(task.name, plan.worker_batch_size, peers, job.run_dir / MEMORY_FILE, log.warn, job.share)
    state = TrainingState(task, job.train, job.device, peers, memory, job.resume)
    for note in state.notes:
        log.warn(note)
    done = position.epoch * plan.num_train + position.epoch_step * plan.batch_size
    meter = Throughput(plan.epochs * plan.num_train - done)
    losses_so_far = RunningMean(remembered)
    record = _Record(job, peers, log, meter, losses_so_far)
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
                result = state.step(batch, lr, num_samples, position.global_step)
                position = Position(epoch, step + 1, position.global_step + 1)
                meter.step(num_samples, batch)
                log.seen(batch)
                told = position.global_step % job.train.log_every_steps == 0 or step + 1 == plan.train_steps
                record.add(_Done(position, lr, batch.index, tuple(result.losses) if told else ()), result)
                wishes = saver.wishes()
                if wishes.any and not record.ends_badly():  # a checkpoint of a bad step would skip it for good
                    saver.save(position, losses_so_far.remembered | log.remembered, best=False)
                    if wishes.stop:
                        saver.fence()
                        return position
            after_bad = record.ends_badly()
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
                        if job.share:
                            job.share(path)
                        log.write("examples", epoch=epoch + 1, path=str(path.relative_to(job.run_dir)))
                    wishes = saver.wishes()
                    if wishes.any and not after_bad:
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
            losses_so_far.clear()
            saver.save(position, log.remembered, best=best, metrics=metrics)
            if saver.wishes().stop and epoch + 1 < plan.epochs:
                break
        saver.fence()
    return position


@dataclass(frozen=True)
class _Done:
    """One training step, from when it was launched until its figures are read."""

    position: Position
    lr: float
    index: np.ndarray
    """Sample numbers of this worker's batch, -1 where there is none."""
    losses: tuple[str, ...]
    """Names of the losses that the event log is told; none of most steps."""


class _Record:
    """What became of the steps: read a little later than they are launched, by every worker at the same step."""

    def __init__(self, job: Job, peers: Peers, log: TaskLog, meter: Throughput, losses_so_far: RunningMean) -> None:
        self._job, self._peers, self._log, self._meter, self._losses = job, peers, log, meter, losses_so_far
        self._readings: Readings[_Done] = Readings(job.device)
        self._bad: list[str] = []
        """The steps in a row, up to the last one read, that had no finite gradient, with their samples."""

    def add(self, done: _Done, step: Step) -> None:
        """Send for a step's figures and take in those that have come. Raises UserError after too many bad steps."""
        figures = step.bad[None].float()
        if done.losses:
            shares = self._peers.sum_on_device(torch.stack(list(step.losses.values())))
            figures = torch.cat([figures.to(shares.dtype), shares])
        self._readings.send(figures, done)
        for earlier, values in self._readings.due():
            self._take(earlier, values)

    def ends_badly(self) -> bool:
        """Whether the last step of all made no update; waits for it."""
        for done, values in self._readings.all():
            self._take(done, values)
        return bool(self._bad)

    def _take(self, done: _Done, values: list[float]) -> None:
        if values[0]:
            self._take_bad(done)
        else:
            self._bad = []
        if done.losses:
            mean = dict(zip(done.losses, values[1:], strict=True))
            self._losses.add(sum(mean.values()))
            cuda = self._job.device.type == "cuda"
            self._log.write(
                "step", epoch=done.position.epoch + 1, step=done.position.global_step, loss=sum(mean.values()),
                losses=mean, lr=done.lr, gpu_memory_bytes=torch.cuda.max_memory_allocated() if cuda else None,
                **self._meter.figures(),
            )  # fmt: skip
            self._log.flush_quarantine()

    def _take_bad(self, done: _Done) -> None:
        name, step = self._job.task.name, done.position.global_step
        ids = self._peers.gather(self._job.sample_ids([int(i) for i in done.index if i >= 0]))
        more = f" and {len(ids) - _IDS_NAMED} more" if len(ids) > _IDS_NAMED else ""
        self._bad.append(f"step {step}: {', '.join(ids[:_IDS_NAMED])}{more}")
        self._log.warn(f"{name}: the loss or its gradient is not finite; no update was made at {self._bad[-1]}.")
        if len(self._bad) >= _MAX_BAD_STEPS:
            raise UserError(
                f"{name} stopped at step {step}: {len(self._bad)} steps in a row had a loss or gradient that is not "
                f"finite. Lower {name}.lr or look at these samples. {'; '.join(self._bad)}."
            )


def _next(batches: Iterator[DeviceBatch], epoch: int, training: bool, step: int) -> DeviceBatch:
    batch = next(batches)
    place = (batch.epoch, batch.training, batch.step)
    assert place == (epoch, training, step), f"the stream is at {place}, the loop at {(epoch, training, step)}"
    return batch
