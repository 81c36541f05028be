"""The one training loop, run in every Ray Train worker. It knows batches, not Ray Data, and reports by callbacks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pillsnap.config import DataSettings, TrainSettings
from pillsnap.data.loader import DeviceBatch
from pillsnap.data.plan import StreamPlan
from pillsnap.errors import UserError
from pillsnap.observe.events import EventLog
from pillsnap.train.checkpoint import Checkpoint, Position, save_checkpoint
from pillsnap.train.examples import draw_examples
from pillsnap.train.meters import Throughput
from pillsnap.train.peers import Peers
from pillsnap.train.schedule import learning_rate
from pillsnap.train.state import TrainingState
from pillsnap.train.tasks import Task

_MAX_BAD_STEPS = 3


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
    report: Callable[[dict[str, float]], None]
    """Called by every worker once an epoch, after its checkpoint is on disk."""


def train(job: Job, batches: Iterator[DeviceBatch]) -> Position:
    """Train from the job's position to the end, or until a stop is requested. Returns where it stands."""
    plan, settings, task = job.plan, job.task.settings, job.task
    position = job.resume.position if job.resume else Position()
    peers = Peers(job.device)
    state = TrainingState(task, job.train, job.device, peers.count, job.resume)
    log = _Log(job, peers)
    saver = _Saver(job, peers, state, log)
    done = position.epoch * plan.num_train + position.epoch_step * plan.batch_size
    meter = Throughput(plan.epochs * plan.num_train - done)
    bad_steps = 0

    for epoch in range(position.epoch, plan.epochs):
        # --- training -------------------------------------------------------------------------------------------------
        first_step = position.epoch_step if epoch == position.epoch else 0
        meter.start_epoch()
        loss_sum, loss_count = 0.0, 0
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
            meter.step(num_samples, batch.wait_s)
            log.seen(batch)

            bad_steps = 0 if torch.isfinite(gradient_norm) else bad_steps + 1
            if bad_steps:
                ids = ", ".join(job.sample_ids([int(i) for i in batch.index if i >= 0]))
                log.warn(
                    f"{task.name} step {position.global_step}: the loss or its gradient is not finite; "
                    f"no update was made ({ids})."
                )
            if bad_steps >= _MAX_BAD_STEPS:
                raise UserError(
                    f"{task.name} stopped at step {position.global_step}: {bad_steps} steps in a row had a loss or "
                    f"gradient that is not finite. Lower {task.name}.lr or look at these samples: {ids}."
                )
            if position.global_step % job.train.log_every_steps == 0 or step + 1 == plan.train_steps:
                mean = dict(zip(losses, peers.sum(torch.stack(list(losses.values()))), strict=True))
                loss_sum, loss_count = loss_sum + sum(mean.values()), loss_count + 1
                log.write(
                    "step", epoch=epoch + 1, step=position.global_step, loss=sum(mean.values()), losses=mean, lr=lr,
                    gpu_memory_bytes=torch.cuda.max_memory_allocated() if job.device.type == "cuda" else None,
                    **meter.figures(),
                )  # fmt: skip
                log.flush_quarantine()
            if saver.due(step):
                saver.save(position, best=False)
            if saver.stopping(step):
                saver.save(position, best=False)
                return position
        position = Position(epoch + 1, 0, position.global_step)
        log.write(
            "epoch",
            epoch=epoch + 1,
            step=position.global_step,
            loss=loss_sum / max(loss_count, 1),
            **meter.epoch_figures(),
        )

        # --- validation -----------------------------------------------------------------------------------------------
        validation_start_s = time.monotonic()
        facts: list[Any] = []
        with torch.inference_mode(), state.evaluating():
            for step in range(plan.val_steps):
                batch = _next(batches, epoch, False, step)
                found = task.validate(state.ema.module, batch)
                facts += found
                log.seen(batch)
                if step == 0 and job.events:
                    path = draw_examples(task, batch, found, job.run_dir, epoch + 1)
                    log.write("examples", epoch=epoch + 1, path=str(path.relative_to(job.run_dir)))
        log.flush_quarantine()
        metrics = task.score(peers.gather(facts))
        best = state.is_best(metrics[task.best_metric])
        log.write(
            "validation", epoch=epoch + 1, step=position.global_step, metrics=metrics, best=best,
            duration_s=time.monotonic() - validation_start_s,
        )  # fmt: skip

        # --- checkpoint -----------------------------------------------------------------------------------------------
        saver.save(position, best=best, metrics=metrics)
        job.report(metrics | {"epoch": epoch + 1})
        if saver.stopping(0) and epoch + 1 < plan.epochs:
            return position
    return position


def _next(batches: Iterator[DeviceBatch], epoch: int, training: bool, step: int) -> DeviceBatch:
    batch = next(batches)
    place = (batch.epoch, batch.training, batch.step)
    assert place == (epoch, training, step), f"the stream is at {place}, the loop at {(epoch, training, step)}"
    return batch


@dataclass
class _Saver:
    """Writes checkpoints, and knows when one is due."""

    job: Job
    peers: Peers
    state: TrainingState
    log: _Log
    started_s: float = field(default_factory=time.monotonic)
    last_saved_s: float = field(default_factory=time.monotonic)

    def due(self, step: int) -> bool:
        """Whether the last checkpoint is too long ago; the same on every worker."""
        overdue = time.monotonic() - self.last_saved_s > 60 * self.job.train.checkpoint_minutes
        return self._agreed(overdue, step)

    def stopping(self, step: int) -> bool:
        """Whether anybody asked the run to stop; the same on every worker."""
        return self._agreed(self.job.stop_requested(), step)

    def save(self, position: Position, *, best: bool, metrics: dict[str, float] | None = None) -> None:
        """Commit a checkpoint; every worker goes on only when it is on disk."""
        failure = ""
        elapsed_s = self.job.elapsed_before_s + time.monotonic() - self.started_s
        if self.peers.rank == 0:
            folder = self.job.run_dir / "checkpoints" / self.job.task.name
            try:
                path = save_checkpoint(
                    folder, position, model=self.state.model.state_dict(), ema=self.state.ema.module.state_dict(),
                    trainer=self.state.trainer_state(),
                    meta=self.job.meta | {"metrics": metrics or {}, "elapsed_s": elapsed_s},
                    best=best, keep=self.job.train.keep_checkpoints,
                )  # fmt: skip
            except OSError as error:
                failure = (
                    f"The checkpoint at step {position.global_step} could not be written to {folder} ({error}); "
                    "the one before is intact."
                )
            else:
                self.log.write(
                    "checkpoint",
                    epoch=position.epoch,
                    step=position.global_step,
                    path=str(path.relative_to(self.job.run_dir)),
                    best=best,
                )
        self.last_saved_s = time.monotonic()
        failures = [text for text in self.peers.gather([failure]) if text]
        if failures:
            raise UserError(failures[0] + " Free disk space and give the same command again.")

    def _agreed(self, flag: bool, step: int) -> bool:
        # Asking the others costs a round trip: with several workers only every few steps.
        if self.peers.count > 1 and step % self.job.train.log_every_steps:
            return False
        return self.peers.any(flag)


class _Log:
    """Events of one task, and the count of photos that could not be used."""

    def __init__(self, job: Job, peers: Peers) -> None:
        self._job, self._peers = job, peers
        self._pending: list[tuple[str, str]] = []
        self._known: dict[str, str] = {}
        self._num_seen = 0

    def write(self, kind: str, **fields: Any) -> None:
        if self._job.events is not None:
            self._job.events.write(kind, task=self._job.task.name, **fields)

    def warn(self, message: str) -> None:
        if self._job.events is not None:
            self._job.events.write("warning", message=message)

    def seen(self, batch: DeviceBatch) -> None:
        """Count a batch's samples, and keep what it could not use for the next flush."""
        self._num_seen += int((batch.index >= 0).sum())
        self._pending += batch.quarantine

    def flush_quarantine(self) -> None:
        """Record newly quarantined photos. Raises UserError with their list when they are more than the settings
        allow.
        """
        num_seen, num_pending = self._peers.sum(torch.tensor([self._num_seen, len(self._pending)], dtype=torch.float64))
        if not num_pending:
            return
        for sample_id, reason in self._peers.gather(self._pending):
            if sample_id not in self._known:
                self._known[sample_id] = reason
                self.write("quarantine", sample_id=sample_id, reason=reason)
        self._pending = []
        total = min(num_seen, self._job.plan.num_train + self._job.plan.num_val)
        limits = self._job.data
        if total >= limits.quarantine_after and len(self._known) > limits.quarantine_fraction * total:
            listed = "; ".join(f"{sample_id} ({reason})" for sample_id, reason in list(self._known.items())[:20])
            raise UserError(
                f"{len(self._known)} of {total:.0f} {self._job.task.name} samples cannot be read, more than the "
                f"{limits.quarantine_fraction:.1%} that data.quarantine_fraction allows. The first: {listed}. "
                "Run `pillsnap manifest validate --deep` for the whole list."
            )
