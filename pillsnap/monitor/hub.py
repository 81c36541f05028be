"""One run being watched: reads its log once for all viewers and never waits for any of them."""

from __future__ import annotations

import asyncio
import json
import struct
import threading
from pathlib import Path
from typing import Any, Protocol

from pillsnap.observe.events import EVENTS_FILE, EventFollower
from pillsnap.observe.state import RunState

POLL_INTERVAL_S = 1.0
# What a connection may have yet to send beside its snapshot; one with more gets no update, and one fresh snapshot once
# it has caught up.
MAX_PENDING_BYTES = 1 << 16
_TEXT_FRAME = 0x81


class Connection(Protocol):
    """The part of an asyncio transport that a viewer needs."""

    def write(self, data: bytes) -> object: ...

    def get_write_buffer_size(self) -> int: ...

    def is_closing(self) -> bool: ...


class Viewer:
    """One connection that is told of updates. `behind` is set while it needs a snapshot first."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._room = 0
        self.behind = asyncio.Event()
        self.behind.set()

    def begin(self, snapshot: str) -> None:
        """From now on updates follow this snapshot, even while a slow connection is still sending it."""
        self._room = MAX_PENDING_BYTES + len(snapshot)
        self.behind.clear()

    def offer(self, frame: bytes) -> None:
        """Send a WebSocket frame now, or not at all.

        Frames are made once and written straight to the connection: with a hundred viewers, a queue and a task each
        for every update took three times as long, from the processors that train.
        """
        if self.behind.is_set() or self._connection.is_closing():
            return
        if self._connection.get_write_buffer_size() <= self._room:
            self._connection.write(frame)
        else:
            self.behind.set()

    def has_caught_up(self) -> bool:
        """Whether there is room for a snapshot."""
        return self._connection.get_write_buffer_size() <= MAX_PENDING_BYTES


class RunHub:
    """Follows one run directory while it has viewers. `ready` is set once the log has been read for the first time."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.viewers: set[Viewer] = set()
        self.ready = asyncio.Event()
        self._follower = EventFollower(run_dir)
        self._state = RunState()
        self._snapshot: str | None = None
        self._lock = threading.Lock()  # the log is read in a thread

    def snapshot(self) -> str:
        """The whole run as one message, made once for all who ask between two changes."""
        if self._snapshot is None:
            with self._lock:
                view, curves = self._state.view(), self._state.curves()
            replaced = {name: {"from": 0, "points": _rounded(points)} for name, points in curves.items()}
            self._snapshot = _encode({"type": "snapshot", "view": view, "curves": replaced})
        return self._snapshot

    def broadcast(self, message: dict[str, Any]) -> None:
        """Offer a message to every viewer."""
        frame = text_frame(_encode(message))
        for viewer in self.viewers:
            viewer.offer(frame)

    async def follow(self) -> None:
        """Read the log and tell the viewers, until cancelled."""
        generations = (0, 0)
        while True:
            # In a thread: a long log takes seconds to read for the first time.
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
        """The task's newest picture of examples, where it is a PNG inside the run directory."""
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
    """The run directories under `parent`, the one written to last first: `name` and `last_time` (unix seconds)."""
    runs = []
    for log in parent.glob(f"*/{EVENTS_FILE}"):
        try:
            runs.append({"name": log.parent.name, "last_time": log.stat().st_mtime})
        except FileNotFoundError:  # deleted meanwhile
            continue
    return sorted(runs, key=lambda run: -run["last_time"])


def text_frame(text: str) -> bytes:
    """A whole message from a server as WebSocket sends it (RFC 6455, section 5.2)."""
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
