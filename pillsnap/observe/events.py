"""The event log of a run: `events.jsonl` in the run directory, one JSON object per line, append-only.

Training appends; Weights & Biases, the progress bars, the monitors and the report only read. Every line has `v`
(schema version), `time` (Unix seconds), `kind`, and the fields of that kind's model in event_kinds.py.
"""

from __future__ import annotations

import contextlib
import enum
import fcntl
import json
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any, Protocol

from pydantic import ValidationError

from pillsnap.observe.event_kinds import KINDS
from pillsnap.observe.logs import log_event
from pillsnap.storage import Storage, is_uri

SCHEMA_VERSION = 1
EVENTS_FILE = "events.jsonl"

# Kinds that are repeated when a task restarts from an earlier position.
_REPEATED_KINDS = ("step", "epoch", "validation", "checkpoint", "budget")


class EventSink(Protocol):
    """Accepts events."""

    def write(self, kind: str, **fields: Any) -> None: ...


class EventLog:
    """Writer of the log: `EventLog(run_dir).write("warning", message="…")`.

    Safe for concurrent threads, and processes of one machine. Opening the log removes an incomplete last line of a
    killed writer. A failed write (disk full) raises OSError and leaves the log ending on a complete line.
    """

    def __init__(self, run_dir: Path | str) -> None:
        self.path = Path(run_dir) / EVENTS_FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        with self._lock, _file_lock(self._fd):
            _drop_incomplete_line(self._fd)

    def write(self, kind: str, **fields: Any) -> None:
        """Append one event. AssertionError for an unknown kind or field, or a value of the wrong type."""
        self.append(encode_event(kind, time.time(), fields))
        log_event(kind, fields)

    def append(self, line: bytes) -> None:
        """Append one line encoded by `encode_event`."""
        with self._lock, _file_lock(self._fd):
            end = os.fstat(self._fd).st_size
            written = os.write(self._fd, line)
            if written != len(line):
                os.ftruncate(self._fd, end)
                raise OSError(
                    f"{self.path}: only {written} of {len(line)} bytes of an event were written; free disk space"
                )

    def close(self) -> None:
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def __enter__(self) -> EventLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def encode_event(kind: str, time_s: float, fields: Mapping[str, Any]) -> bytes:
    """One line of the log in UTF-8, newline included. AssertionError when `fields` do not fit `kind`."""
    assert kind in KINDS, f"unknown event kind {kind!r}"
    try:
        event = KINDS[kind](**_plain(fields))
    except ValidationError as error:
        raise AssertionError(f"event {kind!r}: {error}") from error
    record = {"v": SCHEMA_VERSION, "time": round(time_s, 3), "kind": kind, **event.model_dump()}
    return json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def read_events(run_dir: Path | str) -> list[dict[str, Any]]:
    """All events of a run without superseded ones, oldest first; empty without a log.

    `run_dir` may be a URI (s3://…) supported by pyarrow.fs. An incomplete last line is skipped.
    """
    if is_uri(run_dir):
        data = Storage(str(run_dir)).read(EVENTS_FILE) or b""
    else:
        path = Path(run_dir) / EVENTS_FILE
        data = path.read_bytes() if path.exists() else b""
    return drop_superseded(_parse_lines(data))


def drop_superseded(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Drop events that a restart repeats: before each `task started` at step s with e completed epochs, the task's
    events after step s, and its epochs and validations after e.
    """
    restart_step, restart_epoch = dict[str, float](), dict[str, float]()
    seen_examples: set[tuple[str, str]] = set()
    kept = []
    for event in reversed(events):
        kind, task = event["kind"], event.get("task", "")
        if kind in _REPEATED_KINDS and event["step"] > restart_step.get(task, math.inf):
            continue
        # A checkpoint after the last step of an epoch precedes the epoch event, which is repeated at the same step.
        if kind in ("epoch", "validation") and event["epoch"] > restart_epoch.get(task, math.inf):
            continue
        if kind == "decay" and event["step"] >= restart_step.get(task, math.inf):
            continue  # a worker that starts at its step writes it again
        if kind == "task" and event["status"] == "started":
            restart_step[task] = min(event["step"], restart_step.get(task, math.inf))
            restart_epoch[task] = min(event["epoch"], restart_epoch.get(task, math.inf))
        if kind == "examples" and (task, event["path"]) in seen_examples:
            continue
        if kind == "examples":
            seen_examples.add((task, event["path"]))
        kept.append(event)
    return kept[::-1]


class EventFollower:
    """Reads a growing log incrementally; `offset` is the number of bytes consumed.

    When the log file is replaced, reading restarts at offset 0 and `generation` increases.
    """

    def __init__(self, run_dir: Path | str, offset: int = 0) -> None:
        self.path = Path(run_dir) / EVENTS_FILE
        self.offset = offset
        self.generation = 0
        self._inode: int | None = None

    def poll(self, max_bytes: int = 1 << 20) -> list[dict[str, Any]]:
        """Events since the last call, oldest first: complete lines only, at most `max_bytes`."""
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_size < self.offset or self._inode not in (None, status.st_ino):
                    self.offset = 0
                    self.generation += 1
                self._inode = status.st_ino
                file.seek(self.offset)
                data = file.read(max_bytes)
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self.offset += len(whole)
        return _parse_lines(whole)


def follow_events(
    run_dir: Path | str, stop: threading.Event, offset: int = 0, poll_interval_s: float = 0.2
) -> Iterator[dict[str, Any]]:
    """Yield every event from `offset` (bytes) on; ends once `stop` is set and all events are read.

    Superseded events are included: after a restart, steps repeat from the position of `task started`.
    """
    follower = EventFollower(run_dir, offset)
    while True:
        stopping = stop.is_set()
        events = follower.poll()
        yield from events
        if stopping and not events:
            return
        if not events:
            stop.wait(poll_interval_s)


@contextlib.contextmanager
def _file_lock(fd: int) -> Iterator[None]:
    """Exclusive lock between writers, so that repairing the tail cannot truncate a line being written."""
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)


def _drop_incomplete_line(fd: int, block_bytes: int = 1 << 16) -> None:
    end = os.fstat(fd).st_size
    position = end
    while position > 0:
        start = max(0, position - block_bytes)
        newline = os.pread(fd, position - start, start).rfind(b"\n")
        if newline >= 0:
            position = start + newline + 1
            break
        position = start
    if position != end:
        os.ftruncate(fd, position)


def _parse_lines(data: bytes) -> list[dict[str, Any]]:
    events = []
    for line in data.split(b"\n"):
        try:
            event = json.loads(line) if line else None
        except ValueError:  # an incomplete line after a crash
            continue
        if isinstance(event, dict) and "kind" in event:
            events.append(event)
    return events


def _plain(value: Any) -> Any:
    """JSON values for numpy and torch scalars, paths, enums and containers; NaN and infinity become None."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, enum.Enum):
        return _plain(value.value)
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()  # a file name that is not UTF-8
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, PurePath):
        return _plain(value.as_posix())
    if isinstance(value, Mapping):
        return {_plain(str(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return _plain(value.item())
    raise AssertionError(f"a {type(value).__name__} cannot be stored in an event")
