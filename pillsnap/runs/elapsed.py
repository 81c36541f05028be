"""How long a task has taken, over all drivers that worked on it."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

from pillsnap.files import write_json

_WRITE_EVERY_S = 5.0


class TaskClock:
    """Counts from its making on. What earlier drivers took is in `elapsed.json` of the task's checkpoints, a few
    seconds behind where they were killed; the time between two drivers does not count.
    """

    def __init__(self, folder: Path, at_least_s: float = 0.0) -> None:
        """`at_least_s` is what the last checkpoint says."""
        self._path = folder / "elapsed.json"
        self.started_at_s = time.time()
        self.before_s = max(at_least_s, _read(self._path))
        self._start_s = self._written_s = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        """Seconds so far."""
        return self.before_s + time.monotonic() - self._start_s

    def tick(self) -> None:
        """Remember the time, when that was a while ago."""
        if time.monotonic() - self._written_s >= _WRITE_EVERY_S:
            self._written_s = time.monotonic()
            with contextlib.suppress(OSError):  # a full disk stops the run at its checkpoint, not here
                self._path.parent.mkdir(parents=True, exist_ok=True)
                write_json(self._path, {"elapsed_s": round(self.elapsed_s, 3)})


def _read(path: Path) -> float:
    try:
        return float(json.loads(path.read_text(encoding="utf-8"))["elapsed_s"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0  # the last checkpoint says how long it was at least
