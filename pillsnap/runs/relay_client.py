"""RunBackend of a train worker whose run is kept in remote storage."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pillsnap.observe.events import EventSink, encode_event
from pillsnap.observe.logs import log_event
from pillsnap.runs.checkpoint import Checkpoint, only_writer
from pillsnap.runs.directory import MEMORY_FILE
from pillsnap.runs.remote_checkpoints import PublishedCheckpoints
from pillsnap.storage import StorageError, drop_old_copies, scratch

_REPLY_TIMEOUT_S = 60.0
_POLL_STOP_EVERY_S = 1.0


class RelayEventLog:
    """Event log of rank 0: `write` sends and never blocks, `flush` blocks until everything is published."""

    def __init__(self, relay: Any) -> None:
        """Register as the only sender; the relay drops events of earlier ones."""
        import ray

        self._relay, self._sender = relay, uuid.uuid4().hex
        ray.get(relay.open.remote(self._sender), timeout=_REPLY_TIMEOUT_S)

    def write(self, kind: str, **fields: Any) -> None:
        """Append one event; as `EventLog.write`."""
        self._relay.append.remote(self._sender, encode_event(kind, time.time(), fields))
        log_event(kind, fields)

    def flush(self) -> None:
        """Block until everything that was sent is published. Raises as `Relay.flush`."""
        self._ask(self._relay.flush)

    def check(self) -> None:
        """Raises as `Relay.check`."""
        self._ask(self._relay.check)

    def _ask(self, method: Any) -> None:
        import ray

        try:
            ray.get(method.remote(self._sender), timeout=_REPLY_TIMEOUT_S)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.GetTimeoutError:
            raise StorageError(
                f"The driver's node did not publish the run's events within {_REPLY_TIMEOUT_S:.0f} s: "
                "check its network."
            ) from None


class RelayBackend:
    """This node's copy of the run in `run_dir`; events, log lines and files go to the relay, checkpoints to storage."""

    def __init__(self, uri: str, task: str, relay: Any, rank: int) -> None:
        import ray

        drop_old_copies("worker")
        self.run_dir = scratch(uri, "worker")
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._checkpoints = PublishedCheckpoints(uri, task, "worker")
        self._relay, self._rank = relay, rank
        self._log: RelayEventLog | None = None
        self._stop_reply: Any = None
        self._stop_polled_s, self._stop = float("-inf"), False
        sizes = ray.get(relay.read.remote(MEMORY_FILE), timeout=_REPLY_TIMEOUT_S)
        (self.run_dir / MEMORY_FILE).unlink(missing_ok=True)
        if sizes is not None:
            (self.run_dir / MEMORY_FILE).write_bytes(sizes)

    def last_checkpoint(self) -> tuple[Checkpoint | None, list[str]]:
        return self._checkpoints.find()

    @contextmanager
    def become_writer(self) -> Iterator[EventSink]:
        with only_writer(self._checkpoints.folder):
            self._log = RelayEventLog(self._relay)
            self._checkpoints.take_over()
            yield self._log

    def publish(self, path: Path, *, best: bool, keep: int, announce: Callable[[], None], branch: bool = False) -> None:
        """Upload a checkpoint. Its event, with all events before it, is published before the pointers move."""
        log = self._log
        assert log is not None

        def before_pointers() -> None:
            announce()
            log.flush()

        self._checkpoints.publish(
            path, best=best, branch=branch, keep=keep, before_pointers=before_pointers, check=log.check
        )

    def share(self, path: Path) -> None:
        self._relay.write_file.remote(path.relative_to(self.run_dir).as_posix(), path.read_bytes())

    def send_log(self, line: str) -> None:
        """Send a line of train.log."""
        self._relay.log.remote(line)

    def stop_requested(self) -> bool:
        """As the relay knew it about a second ago. Only rank 0 polls: one worker's request stops all."""
        import ray

        if self._rank != 0:
            return False
        if self._stop_reply is not None and ray.wait([self._stop_reply], timeout=0)[0]:
            self._stop, self._stop_reply = ray.get(self._stop_reply), None
        if self._stop_reply is None and time.monotonic() - self._stop_polled_s > _POLL_STOP_EVERY_S:
            self._stop_polled_s = time.monotonic()
            self._stop_reply = self._relay.stop_requested.remote()
        return self._stop
