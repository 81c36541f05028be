"""Decides when a checkpoint is due, copies the state on the training thread, and writes it on another thread."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pillsnap.errors import UserError
from pillsnap.runs.backend import RunBackend
from pillsnap.runs.checkpoint import Position, copy_state, copy_weights, save_checkpoint
from pillsnap.storage import StorageError
from pillsnap.train.budget_clock import BudgetClock
from pillsnap.train.faults.diagnosis import diagnose
from pillsnap.train.faults.known_faults import DISK_FULL, NOT_WRITTEN
from pillsnap.train.job import Job
from pillsnap.train.schedule.lr_schedule import Schedule
from pillsnap.train.step.collectives import WorkerGroup
from pillsnap.train.step.training_state import TrainingState
from pillsnap.train.task_log import TaskLog

_CHECK_PREEMPTION_EVERY_S = 5.0
_POLL_S = 0.2


class SaveDecision(NamedTuple):
    """What to do after a step; the same on every worker."""

    save: bool
    """A stop is requested, the last checkpoint is too old, or a node is about to be preempted."""
    stop: bool
    end_step: int = 0
    """The step with which the decay has to end, budget_clock.TOO_SMALL, or 0: as planned."""


class CheckpointWriter:
    """Writes a task's checkpoints. Every worker makes the same calls; only rank 0 writes."""

    def __init__(
        self, job: Job, group: WorkerGroup, state: TrainingState, log: TaskLog, schedule: Schedule, clock: BudgetClock
    ) -> None:
        self._job, self._group, self._state, self._log = job, group, state, log
        self._schedule, self._clock = schedule, clock
        self._last_save_s = self._last_check_s = time.monotonic()
        self._preempted = False
        self._pending_sums: deque[Callable[[], list[float]]] = deque()
        """The workers' flags of the last steps, each being summed."""
        self._write: _Write | None = None
        self._unreported: dict[str, float] | None = None

    def decide(self, end_step: int = 0) -> SaveDecision:
        """Agree with all workers on what to do after this step; `end_step` is rank 0's decision, 0 on the others.
        Raises UserError when the checkpoint being written failed.
        """
        now_s = time.monotonic()
        flags = [
            self._job.backend.stop_requested(),
            now_s - self._last_save_s > 60 * self._job.train.checkpoint_minutes,
            now_s - self._last_check_s > _CHECK_PREEMPTION_EVERY_S,
            self._write is not None and self._write.wait(timeout_s=0),
            end_step,
        ]
        self._pending_sums.append(self._group.sum_later(torch.tensor(flags, dtype=torch.float64)))
        if len(self._pending_sums) <= self._group.lag_steps:
            return SaveDecision(save=False, stop=False)
        *sums, agreed_end = self._pending_sums.popleft()()
        stop, due, check_preemption, written = (total > 0 for total in sums)
        if written:
            self.fence()
        if check_preemption:
            self._last_check_s = now_s
            preempted = self._job.preempted()
            if preempted and not self._preempted:
                due = True
                self._log.warn(
                    f"A node is about to be preempted: {self._job.task.name} writes a checkpoint and continues with "
                    "the remaining workers."
                )
            self._preempted = preempted
        return SaveDecision(stop or due, stop, round(agreed_end))

    def save(
        self, position: Position, progress: dict[str, Any], *, best: bool, metrics: dict[str, float] | None = None
    ) -> None:
        """Copy the state and start to write it, once the previous checkpoint is published. `progress` is what the loop
        restores besides the state. `metrics` are given at the end of a validated epoch and reported after publishing.
        """
        self.fence()
        if self._group.rank == 0:
            self._write = _Write(
                self._job.backend,
                self._job.backend.run_dir / "checkpoints" / self._job.task.name,
                position,
                self._announce,
                model=copy_weights(self._state.model.state_dict()),
                ema=copy_weights(self._state.ema.module.state_dict()),
                trainer=copy_state(self._state.trainer_state() | {"progress": progress | self._schedule.progress}),
                meta=self._job.meta
                | {"metrics": metrics or {}, "elapsed_s": self._job.elapsed_s()}
                | self._schedule.meta
                | self._clock.meta,
                best=best,
                branch=position.global_step == self._schedule.branch_step,
                keep=self._job.train.keep_checkpoints,
            )
        self._unreported = metrics and metrics | {"epoch": position.epoch}
        self._last_save_s = time.monotonic()

    def fence(self) -> None:
        """Wait until the checkpoint being written is published, and report it. Raises UserError when it failed."""
        self._pending_sums.clear()  # their flags are older than this checkpoint
        # Polls: an upload may take longer than the timeout of a collective.
        while self._group.any(self._write is not None and not self._write.wait(_POLL_S)):
            pass
        failure = self._write.failure() if self._write else ""
        self._write = None
        failures = [text for text in self._group.gather([failure]) if text]
        if failures:
            raise UserError(failures[0])
        if self._unreported is not None:
            self._job.report(self._unreported)
            self._unreported = None

    def close(self) -> None:
        """Wait for the writing thread, without the other workers."""
        if self._write is not None:
            self._write.wait()

    def _announce(self, position: Position, path: Path, best: bool) -> None:
        self._log.write(
            "checkpoint",
            epoch=position.epoch,
            step=position.global_step,
            path=str(path.relative_to(self._job.backend.run_dir)),
            best=best,
        )


class _Write:
    """The thread that commits and publishes one checkpoint."""

    def __init__(
        self,
        backend: RunBackend,
        folder: Path,
        position: Position,
        announce: Callable[[Position, Path, bool], None],
        *,
        best: bool,
        keep: int,
        branch: bool = False,
        **contents: Any,
    ) -> None:
        self._error: Exception | None = None
        self._step, self._folder = position.global_step, folder

        def write() -> None:
            try:
                path = save_checkpoint(folder, position, best=best, branch=branch, keep=keep, **contents)
                backend.publish(
                    path, best=best, branch=branch, keep=keep, announce=lambda: announce(position, path, best)
                )
            except Exception as error:  # raised on the training thread by `failure`
                self._error = error

        self._thread = threading.Thread(target=write, name="checkpoint")
        self._thread.start()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the thread; whether it has ended."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def failure(self) -> str:
        """Why the checkpoint could not be stored, else empty. Raises every other error. Call after `wait`."""
        if self._error is None:
            return ""
        if isinstance(self._error, StorageError):
            return (
                f"The checkpoint at step {self._step} could not be published; the one before is intact. "
                f"{self._error} Then give the same command again."
            )
        if not is_storage_error(self._error):
            raise self._error
        found = diagnose(self._error, folder=self._folder)
        is_full = found.message.startswith(DISK_FULL.what)
        advice = "Free disk space and give the same command again." if is_full else found.advice
        return (
            f"The checkpoint at step {self._step} could not be written to {self._folder} "
            f"({' '.join(str(self._error).split())}); the one before is intact. {advice}"
        )


def is_storage_error(error: Exception) -> bool:
    """Whether a file could not be written; torch and safetensors raise their own types for that."""
    from safetensors import SafetensorError

    if isinstance(error, OSError | SafetensorError):
        return True
    return isinstance(error, RuntimeError) and NOT_WRITTEN.says(str(error))
