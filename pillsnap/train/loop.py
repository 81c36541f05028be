"""The training loop, run by every Ray Train worker. It gets batches, a Job, and nothing of Ray."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from itertools import takewhile
from typing import Any

import torch

from pillsnap.data.loader import DeviceBatch
from pillsnap.data.plan import StreamPlan
from pillsnap.runs.checkpoint import Position
from pillsnap.runs.directory import MEMORY_FILE
from pillsnap.train.budget_clock import TOO_SMALL, BudgetClock
from pillsnap.train.checkpoint_writer import CheckpointWriter
from pillsnap.train.examples import draw_examples
from pillsnap.train.job import Job
from pillsnap.train.meters import RunningMean, Throughput
from pillsnap.train.schedule.lr_schedule import Schedule
from pillsnap.train.step.collectives import WorkerGroup
from pillsnap.train.step.microbatch import MicrobatchRunner
from pillsnap.train.step.training_state import TrainingState
from pillsnap.train.step_monitor import StepMonitor
from pillsnap.train.task_log import TaskLog


def train(job: Job, batches: Iterator[DeviceBatch]) -> Position:
    """Train from the checkpoint's position to the end, or until a stop is requested. Returns the position reached."""
    plan, task, backend = job.plan, job.task, job.backend
    position = job.resume.position if job.resume else Position()
    progress = job.resume.trainer_state().get("progress", {}) if job.resume else {}
    group = WorkerGroup(job.device, job.train.hang_timeout_s)
    log = TaskLog(job, group, progress)
    microbatches = MicrobatchRunner(
        task.name, plan.worker_batch_size, group, backend.run_dir / MEMORY_FILE, log.warn, backend.share
    )
    state = TrainingState(task, job.train, job.device, group, microbatches, job.resume)
    for note in state.notes:
        log.warn(note)
    free = task.independent_epochs(state.model) if job.train.schedule == "wsd" else 0
    schedule = Schedule(plan, task.settings, job.train, free, position.global_step, progress.get("schedule", {}))
    _log_decay(log, schedule, position)  # a worker may have died between this checkpoint and the event
    meter = Throughput(_images_left(plan, schedule, position))
    epoch_loss = RunningMean(progress)
    monitor = StepMonitor(job, group, log, meter, epoch_loss)
    clock = BudgetClock(job, log)
    with closing(CheckpointWriter(job, group, state, log, schedule, clock)) as checkpoints:
        for epoch in takewhile(lambda epoch: epoch < schedule.end_epoch, range(position.epoch, plan.epochs)):
            # --- training ---------------------------------------------------------------------------------------------
            first_step = position.epoch_step if epoch == position.epoch else 0
            validates = plan.validates(epoch)
            meter.start_epoch()
            for step in range(first_step, plan.train_steps):
                batch = _expected(microbatches.fetch(batches), epoch, training=True, step=step)
                num_samples = plan.samples_in_step(True, step)
                lr = schedule.lr(position.global_step)
                result = state.step(batch, lr, num_samples, position.global_step)
                if schedule.ends_between_validations:
                    state.prepare_validation(batch, *schedule.place_in_decay(position.global_step))
                elif validates:
                    state.prepare_validation(batch, step, plan.train_steps)
                position = Position(epoch, step + 1, position.global_step + 1)
                meter.step(num_samples, batch)
                clock.step()
                log.count(batch)
                monitor.add(position, lr, batch.index, result)
                decision = checkpoints.decide(clock.end_step(position, schedule))
                if decision.end_step == TOO_SMALL:
                    raise clock.refuse()
                due = decision.save or decision.end_step or position.global_step == schedule.branch_step
                # A checkpoint of a bad step would skip its samples for good.
                if due and not monitor.last_step_is_bad():
                    if decision.end_step:
                        schedule.end_early(position.global_step, decision.end_step, "budget")
                        meter.images_left = _images_left(plan, schedule, position)
                    log.flush_quarantine()  # the samples of these steps are not seen again
                    checkpoints.save(position, epoch_loss.progress | log.progress, best=False)
                    if decision.stop:
                        checkpoints.fence()
                        return position
                    if decision.end_step:
                        checkpoints.fence()  # a decision that took effect is never made again
                _log_decay(log, schedule, position)
                if schedule.ends_between_validations and position.global_step >= schedule.end_step:
                    # The stream has other training batches before the validation: the next start skips them.
                    position = Position(schedule.end_epoch - 1, plan.train_steps, position.global_step)
                    log.flush_quarantine()
                    checkpoints.save(position, epoch_loss.progress | log.progress, best=False)
                    checkpoints.fence()
                    return position
            ends_badly = monitor.last_step_is_bad()
            log.write("epoch", epoch=epoch + 1, step=position.global_step, loss=epoch_loss.mean, **meter.epoch())

            # --- validation -------------------------------------------------------------------------------------------
            validation_start_s = time.monotonic()
            facts: list[Any] = []
            with torch.inference_mode(), state.autocast():
                for step in range(plan.val_steps if validates else 0):
                    batch = _expected(microbatches.fetch(batches), epoch, training=False, step=step)
                    batch_facts = microbatches.facts(batch, partial(task.validate, state.ema.module))
                    facts += batch_facts
                    log.count(batch)
                    if step == 0 and job.events:
                        path = draw_examples(task, batch, batch_facts, backend.run_dir, epoch + 1)
                        backend.share(path)
                        log.write("examples", epoch=epoch + 1, path=str(path.relative_to(backend.run_dir)))
                    decision = checkpoints.decide()
                    if decision.save and not ends_badly:
                        position = Position(epoch, plan.train_steps, position.global_step)  # validation starts again
                        checkpoints.save(position, epoch_loss.progress | log.progress, best=False)
                        if decision.stop:
                            checkpoints.fence()
                            return position
            log.flush_quarantine()
            metrics, best = None, False
            if validates:
                metrics = task.score(group.gather(facts))
                best = state.is_best(metrics[task.best_metric], metrics.get("loss", 0.0))
                log.write(
                    "validation", epoch=epoch + 1, step=position.global_step, metrics=metrics, best=best,
                    duration_s=time.monotonic() - validation_start_s,
                )  # fmt: skip

            # --- checkpoint -------------------------------------------------------------------------------------------
            position = Position(epoch + 1, 0, position.global_step)
            epoch_loss.clear()
            if validates and schedule.validated(position, best):
                meter.images_left = _images_left(plan, schedule, position)
                _log_decay(log, schedule, position)
            checkpoints.save(position, log.progress, best=best, metrics=metrics)
            if validates:
                clock.validated()
            if checkpoints.decide().stop and epoch + 1 < schedule.end_epoch:
                break
        checkpoints.fence()
    return position


def _images_left(plan: StreamPlan, schedule: Schedule, position: Position) -> int:
    in_epochs = (schedule.end_epoch - position.epoch) * plan.epoch_samples - position.epoch_step * plan.batch_size
    return min(in_epochs, (schedule.end_step - position.global_step) * plan.batch_size)


def _log_decay(log: TaskLog, schedule: Schedule, position: Position) -> None:
    if schedule.decay is not None and position.global_step == schedule.decay.first_step:
        log.write("decay", epoch=position.epoch, step=position.global_step, **schedule.decay_facts())


def _expected(batch: DeviceBatch, epoch: int, *, training: bool, step: int) -> DeviceBatch:
    got, expected = (batch.epoch, batch.training, batch.step), (epoch, training, step)
    assert got == expected, f"the stream is at {got}, the loop at {expected}"
    return batch
