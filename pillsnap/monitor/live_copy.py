"""Keeps a local copy of a remote run's logs and pictures up to date, so that monitors read local files."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pillsnap.errors import UserError
from pillsnap.observe.events import EVENTS_FILE
from pillsnap.observe.logs import LOG_FILE
from pillsnap.runs.mirror import only_one
from pillsnap.storage import Stamp, Storage, StorageError, is_uri, scratch

POLL_INTERVAL_S = 2.0
_OVERLAP_BYTES = 256
_PICTURE_PREFIX = "examples/"

_log = logging.getLogger(__name__)


@contextmanager
def live_copy(where: str) -> Iterator[Path]:
    """A local folder itself, or for a URI a folder whose event log, train.log and pictures a thread keeps up to date.

    UserError when there is no such remote run, StorageError when it cannot be read.
    """
    if not is_uri(where):
        yield Path(where)
        return
    copy = _LiveCopy(where)
    if not copy.update():
        raise UserError(f"{where} is not a run: it has no {EVENTS_FILE}. Pass another with --run.")
    stop = threading.Event()

    def follow() -> None:
        while not stop.wait(POLL_INTERVAL_S):
            try:
                copy.update()
            except (StorageError, OSError):  # the network may recover
                _log.warning("the log of the run cannot be read", exc_info=True)

    thread = threading.Thread(target=follow, name="live-copy", daemon=True)
    thread.start()
    try:
        yield copy.local
    finally:
        stop.set()
        thread.join(timeout=POLL_INTERVAL_S)


class _LiveCopy:
    def __init__(self, uri: str) -> None:
        self._storage, self.local = Storage(uri), scratch(uri, "reader")
        self._seen: dict[str, Stamp] = {}

    def update(self) -> bool:
        """Fetch new content; False when there is no event log."""
        self.local.mkdir(parents=True, exist_ok=True)
        with only_one(self.local / ".fetch.lock"):
            for line in self._fetch(EVENTS_FILE).split(b"\n"):
                if b'"examples"' in line:
                    self._fetch_picture(line)
            self._fetch(LOG_FILE)
        return EVENTS_FILE in self._seen

    def _fetch(self, name: str) -> bytes:
        """Fetch and return the bytes appended since the last call; all of them when the log was replaced."""
        stamp, path = self._storage.stamp(name), self.local / name
        if stamp is None or stamp == self._seen.get(name):
            return b""
        size = path.stat().st_size if path.exists() else 0
        start = max(0, size - _OVERLAP_BYTES)
        known = b""
        if size:
            with path.open("rb") as file:
                file.seek(start)
                known = file.read()
        new = (self._storage.read(name, start) or b"") if stamp.size >= size else b""
        if stamp.size < size or not new.startswith(known):
            self._storage.download(name, path)
            new, known = path.read_bytes(), b""
        else:
            with path.open("ab") as file:
                file.write(new[len(known) :])
        self._seen[name] = stamp
        return new[len(known) :]

    def _fetch_picture(self, line: bytes) -> None:
        try:
            name = str(json.loads(line)["path"])
        except (ValueError, KeyError, TypeError):
            return
        if name.startswith(_PICTURE_PREFIX) and ".." not in name and not (self.local / name).exists():
            self._storage.download(name, self.local / name)
