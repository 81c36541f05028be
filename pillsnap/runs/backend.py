"""How a train worker reads and writes its run: in a folder, or through the driver's relay and remote storage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

from pillsnap.observe.events import EventLog, EventSink
from pillsnap.runs.checkpoint import Checkpoint, find_checkpoint, only_writer
from pillsnap.runs.directory import STOP_FILE


class RunBackend(Protocol):
    """One worker's access to the run. Only rank 0 calls `become_writer` and `publish`."""

    run_dir: Path
    """The run, or this node's copy of it."""

    @property
    def send_log(self) -> Callable[[str], None] | None:
        """Takes the lines of train.log; None when they go to `run_dir`."""
        ...

    def last_checkpoint(self) -> tuple[Checkpoint | None, list[str]]:
        """The task's last sound checkpoint, and one message per damaged one."""
        ...

    def become_writer(self) -> AbstractContextManager[EventSink]:
        """Exclude workers of earlier starts from writing checkpoints and events; gives the event log."""
        ...

    def publish(self, path: Path, *, best: bool, keep: int, announce: Callable[[], None], branch: bool = False) -> None:
        """Make a checkpoint that is committed in `run_dir` count for the run. `announce` writes its event first."""
        ...

    def share(self, path: Path) -> None:
        """Add a file that was written to `run_dir` to the run."""
        ...

    def stop_requested(self) -> bool:
        """Whether the run is asked to stop; never blocks."""
        ...


class LocalBackend:
    """A run in a folder that all workers mount: what is written there counts."""

    send_log: Callable[[str], None] | None = None

    def __init__(self, run_dir: Path, task: str) -> None:
        self.run_dir = run_dir
        self._checkpoints = run_dir / "checkpoints" / task

    def last_checkpoint(self) -> tuple[Checkpoint | None, list[str]]:
        return find_checkpoint(self._checkpoints)

    @contextmanager
    def become_writer(self) -> Iterator[EventSink]:
        with only_writer(self._checkpoints), EventLog(self.run_dir) as events:
            yield events

    def publish(self, path: Path, *, best: bool, keep: int, announce: Callable[[], None], branch: bool = False) -> None:
        announce()

    def share(self, path: Path) -> None:
        pass

    def stop_requested(self) -> bool:
        return (self.run_dir / STOP_FILE).exists()


def connect(run_dir: str, uri: str, relay: Any, *, task: str, rank: int) -> RunBackend:
    """The backend for one worker: through `relay` when the run is kept under `uri`, else `run_dir` itself."""
    if not uri:
        return LocalBackend(Path(run_dir), task)
    from pillsnap.runs.relay_client import RelayBackend

    return RelayBackend(uri, task, relay, rank)
