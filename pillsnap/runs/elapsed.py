"""How long a task has taken, over all drivers that worked on it."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

from pillsnap.files import write_json

_WRITE_EVERY_S = 5.0


class ElapsedTime:
    """Measures elapsed time from construction, and adds that of earlier drivers.

    Theirs is read from `elapsed.json` beside the task's checkpoints, which lags a killed driver by a few seconds. Time
    between two drivers does not count.
    """

    def __init__(self, folder: Path, at_least_s: float = 0.0) -> None:
        """`at_least_s` is the elapsed time of the last checkpoint."""
        self._path = folder / "elapsed.json"
        self.started_at_s = time.time()
        self.before_s = max(at_least_s, _read(self._path))
        self._start_s = self._written_s = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        """Seconds so far."""
        return self.before_s + time.monotonic() - self._start_s

    def tick(self) -> None:
        """Write the elapsed time every few seconds."""
        if time.monotonic() - self._written_s >= _WRITE_EVERY_S:
            self._written_s = time.monotonic()
            with contextlib.suppress(OSError):  # on a full disk, the next checkpoint ends the run
                self._path.parent.mkdir(parents=True, exist_ok=True)
                write_json(self._path, {"elapsed_s": round(self.elapsed_s, 3)})


def _read(path: Path) -> float:
    try:
        return float(json.loads(path.read_text(encoding="utf-8"))["elapsed_s"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0  # the last checkpoint gives a lower bound
