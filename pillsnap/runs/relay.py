"""The relay: an actor on the driver's node that writes what train workers of a remote run send, and publishes it.

    rank 0 --events, log lines, pictures--> Relay --> the driver's copy of the run --every few seconds--> storage

The event log has one writer, whatever node rank 0 is on. Sending never blocks; `flush` does, before a checkpoint
counts. Each start of the workers registers itself: events of a replaced rank 0 that is still alive are dropped, and it
cannot publish a checkpoint.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pillsnap.errors import UserError
from pillsnap.observe.events import EventLog
from pillsnap.observe.logs import LOG_FILE, SharedRotatingHandler
from pillsnap.runs.directory import STOP_FILE
from pillsnap.runs.driver_lock import check_not_lost
from pillsnap.runs.mirror import RunMirror

_POLL_EVERY_S = 1.0


class Relay:
    """The actor's class. Calls of one worker are served in order."""

    def __init__(self, uri: str, run_dir: str) -> None:
        self._uri, self._run_dir = uri, Path(run_dir)
        self._mirror = RunMirror(uri, self._run_dir)
        self._events = EventLog(self._run_dir)
        self._log = SharedRotatingHandler(self._run_dir / LOG_FILE)
        self._sender = ""
        self._publishing, self._stop = threading.Lock(), threading.Event()
        threading.Thread(target=self._publish_periodically, name="publish", daemon=True).start()

    def open(self, sender: str) -> None:
        """Accept events from `sender` only."""
        self._sender = sender

    def append(self, sender: str, line: bytes) -> None:
        """Append a line to the event log."""
        if sender == self._sender:
            self._events.append(line)

    def log(self, line: str) -> None:
        """Append a line to train.log."""
        self._log.handle(logging.makeLogRecord({"msg": line}))

    def write_file(self, name: str, data: bytes) -> None:
        """Write a file of the run, replacing it as a whole."""
        path = self._run_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_bytes(data)
        partial.replace(path)

    def read(self, name: str) -> bytes | None:
        """A file of the run; None when it does not exist."""
        path = self._run_dir / name
        return path.read_bytes() if path.exists() else None

    def stop_requested(self) -> bool:
        """Whether the run is asked to stop."""
        return (self._run_dir / STOP_FILE).exists()

    def check(self, sender: str = "") -> None:
        """Raise UserError when `sender` or this driver was replaced, StorageError when the lock cannot be read."""
        if sender not in ("", self._sender):
            raise UserError("This worker was replaced: its checkpoint does not count.")
        check_not_lost(self._uri, self._run_dir)

    def flush(self, sender: str = "") -> None:
        """Publish everything received so far. Raises as `check`, and StorageError when it cannot be written."""
        self.check(sender)
        with self._publishing:
            self._mirror.publish()

    def close(self) -> None:
        """Publish nothing more. An actor needs no close: it ends with its process."""
        self._stop.set()

    def _publish_periodically(self) -> None:
        while not self._stop.wait(_POLL_EVERY_S):
            try:
                self.check()
                with self._publishing:
                    self._mirror.publish_if_due()
            except (OSError, UserError) as error:  # retried; an unpublished checkpoint ends the run in `flush`
                self.log(f"WARNING relay: not published: {error}")


@contextmanager
def start_relay(uri: str, run_dir: Path) -> Iterator[Any]:
    """Ray's handle of a relay on the driver's node; None for a run in a folder. Ray must be up.

    The actor ends with the context; driver_lock.driving publishes what it has not.
    """
    if not uri:
        yield None
        return
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    relay = ray.remote(num_cpus=0, max_restarts=0, scheduling_strategy=here)(Relay).remote(uri, str(run_dir))
    try:
        yield relay
    finally:
        ray.kill(relay)


def flush_relay(relay: Any) -> None:
    """Publish everything the relay has received. Raises as `Relay.flush`."""
    import ray

    try:
        ray.get(relay.flush.remote())
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
