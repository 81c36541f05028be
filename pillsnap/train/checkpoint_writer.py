"""When a checkpoint is due, and its writing: copied on the training thread, written by a thread beside it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from pillsnap.errors import UserError
from pillsnap.runs.checkpoint import Position, copy_state, copy_weights, save_checkpoint
from pillsnap.storage import StorageError
from pillsnap.train.job import Publish

if TYPE_CHECKING:
    from pillsnap.train.collectives import Peers
    from pillsnap.train.job import Job
    from pillsnap.train.state import TrainingState
    from pillsnap.train.task_log import TaskLog

_ASK_RAY_EVERY_S = 5.0
_LOOK_EVERY_S = 0.2


class Wishes(NamedTuple):
    """What any worker wants after a step; the same on every worker."""

    stop: bool
    """Somebody asked the run to end."""
    save: bool
    """The last checkpoint is too long ago, or a node is about to go away."""

    @property
    def any(self) -> bool:
        """Whether a checkpoint of this moment is wanted."""
        return self.stop or self.save


class Saver:
    """Writes a task's checkpoints. All its methods are to be called by every worker alike; only rank 0 writes."""

    def __init__(self, job: Job, peers: Peers, state: TrainingState, log: TaskLog) -> None:
        self._job, self._peers, self._state, self._log = job, peers, state, log
        self._started_s = self._last_save_s = self._last_question_s = time.monotonic()
        self._preempted = False
        self._asked: deque[Callable[[], list[float]]] = deque()
        """What the workers were asked at the last steps and has not been acted on."""
        self._writer: _Writer | None = None
        self._unreported: dict[str, float] | None = None

    def wishes(self) -> Wishes:
        """Agree on what is to be done now. Raises UserError when the checkpoint being written cannot be."""
        now_s = time.monotonic()
        written = self._writer is not None and self._writer.ended
        flags = [
            self._job.stop_requested(),
            now_s - self._last_save_s > 60 * self._job.train.checkpoint_minutes,
            now_s - self._last_question_s > _ASK_RAY_EVERY_S,
            written,
        ]
        self._asked.append(self._peers.sum_later(torch.tensor(flags, dtype=torch.float64)))
        if len(self._asked) <= self._peers.lag_steps:
            return Wishes(False, False)
        stop, due, ask, written = (total > 0 for total in self._asked.popleft()())
        if written:
            self.fence()
        if ask:
            self._last_question_s = now_s
            notice = self._job.preempted()
            due = due or (notice and not self._preempted)
            if notice and not self._preempted:
                self._log.warn(
                    f"A node is about to be taken away: {self._job.task.name} writes a checkpoint and goes on "
                    "with the workers that are left."
                )
            self._preempted = notice
        return Wishes(stop, due)

    def save(
        self, position: Position, progress: dict[str, Any], *, best: bool, metrics: dict[str, float] | None = None
    ) -> None:
        """Start to write a checkpoint of this moment, once the one before is on disk. `progress` is what the loop
        remembers beside the state. With `metrics` it ends an epoch and is reported when it is on disk.
        """
        self.fence()
        if self._peers.rank == 0:
            elapsed_s = self._job.elapsed_before_s + time.monotonic() - self._started_s
            self._writer = _Writer(
                self._job.run_dir / "checkpoints" / self._job.task.name,
                position,
                self._commit,
                self._job.publish,
                model=copy_weights(self._state.model.state_dict()),
                ema=copy_weights(self._state.ema.module.state_dict()),
                trainer=copy_state(self._state.trainer_state() | {"progress": progress}),
                meta=self._job.meta | {"metrics": metrics or {}, "elapsed_s": elapsed_s},
                best=best,
                keep=self._job.train.keep_checkpoints,
            )
        self._unreported = metrics and metrics | {"epoch": position.epoch}
        self._last_save_s = time.monotonic()

    def fence(self) -> None:
        """Wait until the checkpoint that was started is on disk, and where the run is kept, and report it. Raises
        UserError when it cannot be.
        """
        self._asked.clear()  # they speak of a time before this checkpoint
        if self._job.publish is not None:  # an upload may take longer than workers wait for each other
            while self._peers.any(self._is_writing):
                time.sleep(_LOOK_EVERY_S)
        failure = self._writer.wait() if self._writer else ""
        self._writer = None
        failures = [text for text in self._peers.gather([failure]) if text]
        if failures:
            raise UserError(failures[0])
        if self._unreported is not None:
            self._job.report(self._unreported)
            self._unreported = None

    @property
    def _is_writing(self) -> bool:
        return self._writer is not None and not self._writer.ended

    def close(self) -> None:
        """End the writing thread, whatever happened; nobody waits for the other workers."""
        if self._writer is not None:
            self._writer.wait()

    def _commit(self, position: Position, path: Path, best: bool) -> None:
        self._log.write(
            "checkpoint",
            epoch=position.epoch,
            step=position.global_step,
            path=str(path.relative_to(self._job.run_dir)),
            best=best,
        )


class _Writer:
    """One checkpoint on its way to the disk."""

    def __init__(
        self,
        folder: Path,
        position: Position,
        commit: Callable[[Position, Path, bool], None],
        publish: Publish | None,
        **contents: Any,
    ) -> None:
        self._failure: Exception | None = None
        self._step, self._folder = position.global_step, folder

        def write() -> None:
            try:
                path = save_checkpoint(folder, position, **contents)
                best = contents["best"]
                if publish is None:
                    commit(position, path, best)
                else:
                    publish(path, best=best, keep=contents["keep"], announce=lambda: commit(position, path, best))
            except Exception as error:  # whatever it is, it belongs to the training thread
                self._failure = error

        self._thread = threading.Thread(target=write, name="checkpoint")
        self._thread.start()

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> str:
        """Until it is on disk, and published; why it is not, where that is the storage's fault, else empty."""
        self._thread.join()
        if self._failure is None:
            return ""
        if isinstance(self._failure, StorageError):
            return (
                f"The checkpoint at step {self._step} could not be published; the one before is intact. "
                f"{self._failure} Then give the same command again."
            )
        if not is_storage_error(self._failure):
            raise self._failure
        return (
            f"The checkpoint at step {self._step} could not be written to {self._folder} "
            f"({' '.join(str(self._failure).split())}); the one before is intact. "
            "Free disk space and give the same command again."
        )


def is_storage_error(error: Exception) -> bool:
    """Whether a file could not be written; torch and safetensors have names of their own for that."""
    from safetensors import SafetensorError

    if isinstance(error, OSError | SafetensorError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("PytorchStreamWriter" in text or "write" in text.lower())
