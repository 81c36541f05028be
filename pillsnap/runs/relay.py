"""Where the workers of a run in remote storage hand in what belongs into the run's folder: an actor beside the driver.

    rank 0 --events, log lines, pictures--> Desk --> the driver's copy of the run --every few seconds--> storage

So the event log has one writer whatever node rank 0 is on. Handing in never waits; `flush` does, before a checkpoint
counts. Each start of the workers opens the desk for itself: what an earlier rank 0 that is not quite dead still hands
in is dropped, and it cannot publish a checkpoint.
"""

from __future__ import annotations

import logging
import threading
import time
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

_LOOK_EVERY_S = 1.0


class Desk:
    """The actor. Its calls are served in the order in which a worker makes them."""

    def __init__(self, uri: str, run_dir: str) -> None:
        self._run_dir = Path(run_dir)
        self._mirror = RunMirror(uri, self._run_dir)
        self._events = EventLog(self._run_dir)
        self._log = SharedRotatingHandler(self._run_dir / LOG_FILE)
        self._holder = ""
        self._publishing = threading.Lock()
        threading.Thread(target=self._publish_now_and_then, name="publish", daemon=True).start()

    def open(self, holder: str) -> None:
        """From now on only events of this start of the workers are taken."""
        self._holder = holder

    def append(self, holder: str, line: bytes) -> None:
        """Take a line of the event log."""
        if holder == self._holder:
            self._events.append(line)

    def log(self, line: str) -> None:
        """Take a line of train.log."""
        self._log.handle(logging.makeLogRecord({"msg": line}))

    def keep(self, name: str, data: bytes) -> None:
        """Take a file of the run, replaced whole."""
        path = self._run_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_bytes(data)
        partial.replace(path)

    def read(self, name: str) -> bytes | None:
        """A file of the run; None when there is none."""
        path = self._run_dir / name
        return path.read_bytes() if path.exists() else None

    def stop_requested(self) -> bool:
        """Whether somebody asked the run to end."""
        return (self._run_dir / STOP_FILE).exists()

    def flush(self, holder: str = "") -> None:
        """Publish what was handed in before. Raises UserError when another start of the workers, or another driver, has
        taken the run, and StorageError when the storage cannot be written.
        """
        if holder not in ("", self._holder):
            raise UserError("This worker was replaced: its checkpoint does not count.")
        check_not_lost(self._run_dir)
        with self._publishing:
            self._mirror.publish()

    def _publish_now_and_then(self) -> None:
        while True:
            time.sleep(_LOOK_EVERY_S)
            try:
                check_not_lost(self._run_dir)
                with self._publishing:
                    self._mirror.publish_if_due()
            except (OSError, UserError) as error:  # the next time may do; a checkpoint that cannot be ends the run
                self.log(f"WARNING desk: not published: {error}")


@contextmanager
def open_desk(uri: str, run_dir: Path) -> Iterator[Any]:
    """The desk of a remote run as Ray's handle of it, on the driver's node; None for a run in a folder. Ray must be up.

    It ends with the driver. What it did not publish by then, the driver does (driver_lock.driving).
    """
    if not uri:
        yield None
        return
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    desk = ray.remote(num_cpus=0, max_restarts=0, scheduling_strategy=here)(Desk).remote(uri, str(run_dir))
    try:
        yield desk
    finally:
        ray.kill(desk)
