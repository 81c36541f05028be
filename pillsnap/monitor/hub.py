"""Broadcasts a run to the viewers of the web monitor: the log is read once, and no viewer delays another."""

from __future__ import annotations

import asyncio
import json
import struct
import threading
from pathlib import Path
from typing import Any, Protocol

from pillsnap.observe.events import EVENTS_FILE, EventFollower
from pillsnap.observe.run_state import RunState

POLL_INTERVAL_S = 1.0
# Limit of unsent bytes per connection, beside its snapshot. Beyond it, updates are dropped, and a new snapshot is sent
# once the connection has caught up.
MAX_PENDING_BYTES = 1 << 16
_TEXT_FRAME = 0x81


class Connection(Protocol):
    """The part of an asyncio transport used by `Viewer`."""

    def write(self, data: bytes) -> object: ...

    def get_write_buffer_size(self) -> int: ...

    def is_closing(self) -> bool: ...


class Viewer:
    """A connection that receives updates; `behind` is set while it needs a snapshot first."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._max_pending_bytes = 0
        self.behind = asyncio.Event()
        self.behind.set()

    def begin(self, snapshot: str) -> None:
        """Accept updates after `snapshot`, even before a slow connection has sent it."""
        self._max_pending_bytes = MAX_PENDING_BYTES + len(snapshot)
        self.behind.clear()

    def offer(self, frame: bytes) -> None:
        """Write a WebSocket frame to the connection, or drop it when the viewer is behind."""
        if self.behind.is_set() or self._connection.is_closing():
            return
        if self._connection.get_write_buffer_size() <= self._max_pending_bytes:
            self._connection.write(frame)
        else:
            self.behind.set()

    def has_caught_up(self) -> bool:
        """Whether the connection can take a snapshot."""
        return self._connection.get_write_buffer_size() <= MAX_PENDING_BYTES


class RunHub:
    """Follows one run directory while it has viewers; `ready` is set after the first read of the log."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.viewers: set[Viewer] = set()
        self.ready = asyncio.Event()
        self._follower = EventFollower(run_dir)
        self._state = RunState()
        self._snapshot: str | None = None
        self._lock = threading.Lock()  # the log is read in a thread

    def snapshot(self) -> str:
        """The whole run as one message; cached until the next change."""
        if self._snapshot is None:
            with self._lock:
                view, curves = self._state.view(), self._state.curves()
            replaced = {name: {"from": 0, "points": _rounded(points)} for name, points in curves.items()}
            self._snapshot = _encode({"type": "snapshot", "view": view, "curves": replaced})
        return self._snapshot

    def broadcast(self, message: dict[str, Any]) -> None:
        """Offer a message to every viewer, encoded once."""
        frame = text_frame(_encode(message))
        for viewer in self.viewers:
            viewer.offer(frame)

    async def follow(self) -> None:
        """Poll the log and broadcast changes, until cancelled."""
        generations = (0, 0)
        while True:
            # In a thread: the first read of a long log takes seconds.
            changed = await asyncio.to_thread(self._read)
            if changed:
                changes = self._state.take_curve_changes()
                self._snapshot = None
                if generations != (self._follower.generation, self._state.generation):
                    generations = (self._follower.generation, self._state.generation)
                    for viewer in self.viewers:
                        viewer.behind.set()
                else:
                    curves = {name: change | {"points": _rounded(change["points"])} for name, change in changes.items()}
                    self.broadcast({"type": "update", "view": self._state.view(), "curves": curves})
            self.ready.set()
            await asyncio.sleep(POLL_INTERVAL_S)

    def picture_path(self, task: str) -> Path | None:
        """The task's latest picture of examples, if it is a PNG file inside the run directory."""
        state = self._state.tasks.get(task)
        if state is None or state.examples is None:
            return None
        path = (self.run_dir / state.examples).resolve()
        is_inside = path.is_relative_to(self.run_dir.resolve()) and path.suffix == ".png"
        return path if is_inside and path.is_file() else None

    def _read(self) -> bool:
        changed = False
        while True:
            generation = self._follower.generation
            events = self._follower.poll()
            if self._follower.generation != generation:
                self._state = RunState()
            if not events:
                return changed
            with self._lock:
                for event in events:
                    self._state.apply(event)
            changed = True


def list_runs(parent: Path) -> list[dict[str, Any]]:
    """The run directories under `parent`, latest first: `name` and `last_time` (Unix seconds)."""
    runs = []
    for log in parent.glob(f"*/{EVENTS_FILE}"):
        try:
            runs.append({"name": log.parent.name, "last_time": log.stat().st_mtime})
        except FileNotFoundError:  # deleted in the meantime
            continue
    return sorted(runs, key=lambda run: -run["last_time"])


def text_frame(text: str) -> bytes:
    """An unfragmented, unmasked WebSocket text frame (RFC 6455, section 5.2)."""
    data = text.encode()
    if len(data) < 126:
        return struct.pack("!BB", _TEXT_FRAME, len(data)) + data
    if len(data) < 1 << 16:
        return struct.pack("!BBH", _TEXT_FRAME, 126, len(data)) + data
    return struct.pack("!BBQ", _TEXT_FRAME, 127, len(data)) + data


def _rounded(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x, float(f"{y:.6g}")) for x, y in points]


def _encode(message: dict[str, Any]) -> str:
    return json.dumps(message, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
