"""A train worker's side of a run that is kept in remote storage."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pillsnap.observe.events import encode_event
from pillsnap.observe.logs import log_event
from pillsnap.runs.directory import MEMORY_FILE
from pillsnap.runs.remote_checkpoints import PublishedCheckpoints
from pillsnap.storage import StorageError, drop_old_copies, scratch

_ANSWER_S = 60.0
_ASK_EVERY_S = 1.0


class DeskLog:
    """The run's event log as rank 0 sees it: `write` hands in and never waits, `flush` waits until it is published."""

    def __init__(self, desk: Any) -> None:
        """From now on the desk hears this start of the workers alone."""
        import ray

        self._desk, self._holder = desk, uuid.uuid4().hex
        ray.get(desk.open.remote(self._holder), timeout=_ANSWER_S)

    def write(self, kind: str, **fields: Any) -> None:
        """Append one event; as `EventLog.write`."""
        self._desk.append.remote(self._holder, encode_event(kind, time.time(), fields))
        log_event(kind, fields)

    def flush(self) -> None:
        """Wait until all that was handed in is published. Raises what `Desk.flush` does."""
        import ray

        try:
            ray.get(self._desk.flush.remote(self._holder), timeout=_ANSWER_S)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.GetTimeoutError:
            raise StorageError(
                f"The driver's node did not publish the run's events within {_ANSWER_S:.0f} s: look at its network."
            ) from None


class RemoteRun:
    """This node's copy of the run in `run_dir`, what a worker hands in, and the checkpoints it publishes."""

    def __init__(self, uri: str, task: str, desk: Any) -> None:
        import ray

        drop_old_copies("worker")
        self.run_dir = scratch(uri, "worker")
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._checkpoints = PublishedCheckpoints(uri, task, "worker")
        self._desk = desk
        self._log: DeskLog | None = None
        remembered = ray.get(desk.read.remote(MEMORY_FILE), timeout=_ANSWER_S)
        (self.run_dir / MEMORY_FILE).unlink(missing_ok=True)
        if remembered is not None:
            (self.run_dir / MEMORY_FILE).write_bytes(remembered)

    @contextmanager
    def take_over(self) -> Iterator[DeskLog]:
        """Be the one worker that writes; no earlier one can publish any more. Needs the node's writer lock."""
        self._log = DeskLog(self._desk)
        self._checkpoints.take_over()
        yield self._log

    def publish(self, path: Path, *, best: bool, keep: int, announce: Callable[[], None]) -> None:
        """Upload a checkpoint. `announce` writes its event, which is published with all before it, then it counts."""
        log = self._log
        assert log is not None

        def consent() -> None:
            announce()
            log.flush()

        self._checkpoints.publish(path, best=best, keep=keep, consent=consent)

    def share(self, path: Path) -> None:
        """Hand in a file that was written to `run_dir`."""
        self._desk.keep.remote(path.relative_to(self.run_dir).as_posix(), path.read_bytes())

    def send_log(self, line: str) -> None:
        """Hand in a line of train.log."""
        self._desk.log.remote(line)

    def stop_requested(self, asks: bool) -> Callable[[], bool]:
        """Whether the run was asked to end, as it was known a second ago; never waits. Workers that do not ask say no,
        as one that says yes is enough.
        """
        import ray

        asked: list[Any] = []
        last_s, answer = float("-inf"), False

        def stop_requested() -> bool:
            nonlocal last_s, answer
            if asked and ray.wait(asked, timeout=0)[0]:
                answer = ray.get(asked.pop())
            if not asked and time.monotonic() - last_s > _ASK_EVERY_S:
                last_s = time.monotonic()
                asked.append(self._desk.stop_requested.remote())
            return answer

        return stop_requested if asks else lambda: False
