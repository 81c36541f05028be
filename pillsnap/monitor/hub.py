"""One run being watched: reads its log once for all viewers and never waits for any of them."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

from pillsnap.observe.events import EVENTS_FILE, EventFollower
from pillsnap.observe.state import RunState

POLL_INTERVAL_S = 1.0
# What a viewer may lag behind before its updates are thrown away for one fresh snapshot.
MAX_QUEUED_MESSAGES = 16


class Viewer:
    """The messages that one connection has yet to send: few of them, the text shared with all other viewers."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[str] = asyncio.Queue(MAX_QUEUED_MESSAGES)
        self.needs_snapshot = True
        self._wake = asyncio.Event()
        self._wake.set()

    def offer(self, message: str) -> None:
        if self.needs_snapshot:
            return
        try:
            self.queue.put_nowait(message)
        except asyncio.QueueFull:
            self.start_over()
        self._wake.set()

    def start_over(self) -> None:
        """Forget what is queued: the next message will be a snapshot."""
        while not self.queue.empty():
            self.queue.get_nowait()
        self.needs_snapshot = True
        self._wake.set()

    async def next_message(self, hub: RunHub) -> str:
        while True:
            await self._wake.wait()
            if self.needs_snapshot:
                self.needs_snapshot = False
                return hub.snapshot()
            if not self.queue.empty():
                return self.queue.get_nowait()
            self._wake.clear()


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
        text = _encode(message)
        for viewer in self.viewers:
            viewer.offer(text)

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
                        viewer.start_over()
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


def _rounded(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x, float(f"{y:.6g}")) for x, y in points]


def _encode(message: dict[str, Any]) -> str:
    return json.dumps(message, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
