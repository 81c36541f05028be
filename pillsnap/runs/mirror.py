"""Synchronises this node's copy of a remote run: fetches and publishes its files.

The published files are authoritative, a copy is a cache. Checkpoints are published separately (remote_checkpoints.py);
the decode-once store is read in place; files of Ray and Weights & Biases stay on this node.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pillsnap.files import write_json
from pillsnap.storage import Stamp, Storage, drop_old_copies, is_uri, scratch

_INDEX = ".published.json"
_STAYS = re.compile(
    r"(?:.*/)?\..*|(?:ray|wandb|store)/.*|monitor\.(?:pid|log)|stop-requested|"
    r"checkpoints/[^/]+/(?:step-.*|last\.json|best\.json)"
)
_GROWING = ("events.jsonl", "train.log")
PUBLISH_EVERY_S = 5.0
MAX_BYTES_PER_S = 1e6
"""Files are published as a whole: a log of 10 MB is uploaded every 10 s instead of every 5 s."""


class RunMirror:
    """The files of a run under a URI and in a folder of this node. Raises StorageError."""

    def __init__(self, uri: str, local: Path) -> None:
        self.storage, self.local = Storage(uri), local
        self._next_s = 0.0

    def fetch(self) -> None:
        """Make the folder equal to the published files, except for those that stay on this node. A log that continues
        the published one is kept: its driver was killed before it published the end.
        """
        self.local.mkdir(parents=True, exist_ok=True)
        published = {name: stamp for name, stamp in self.storage.files().items() if not _STAYS.fullmatch(name)}
        index = self._read_index()
        with only_one(self.local / ".fetch.lock"):
            for name, stamp in published.items():
                path = self.local / name
                if path.exists() and index.get(name) == [*_stamp(path), *stamp]:
                    continue
                if name in _GROWING and path.exists() and path.read_bytes().startswith(self.storage.read(name) or b""):
                    index.pop(name, None)
                    continue
                if self.storage.download(name, path):
                    index[name] = [*_stamp(path), *stamp]
            for name in self._names():
                if name not in published:
                    (self.local / name).unlink()
            write_json(self.local / _INDEX, {name: index[name] for name in published if name in index})

    def publish(self) -> None:
        """Upload every file that changed since it was fetched or published."""
        index = self._read_index()
        changed = False
        for name in self._names():
            path = self.local / name
            with contextlib.suppress(FileNotFoundError):  # replaced or rotated concurrently
                before = _stamp(path)
                if index.get(name, [])[:2] == [*before]:
                    continue
                self.storage.upload(path, name)
                index[name] = [*before, *(self.storage.stamp(name) or Stamp(0, 0))]
                changed = True
        if changed:
            write_json(self.local / _INDEX, index)

    def publish_if_due(self) -> None:
        """As `publish`, at most every few seconds, and less often the longer the logs are."""
        if time.monotonic() < self._next_s:
            return
        sizes = [os.path.getsize(self.local / name) for name in _GROWING if (self.local / name).exists()]
        self._next_s = time.monotonic() + max(PUBLISH_EVERY_S, sum(sizes) / MAX_BYTES_PER_S)
        self.publish()

    def _names(self) -> list[str]:
        names = []
        for folder, folders, files in os.walk(self.local):
            inside = Path(folder).relative_to(self.local)
            folders[:] = [name for name in folders if not _STAYS.fullmatch(f"{(inside / name).as_posix()}/")]
            names += [(inside / name).as_posix() for name in files]
        return sorted(name for name in names if not _STAYS.fullmatch(name))

    def _read_index(self) -> dict[str, list[int]]:
        try:
            return json.loads((self.local / _INDEX).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}


def local_run(where: str) -> Path:
    """A run's folder on this node: itself, or a copy of the published files, fetched now."""
    if not is_uri(where):
        return Path(where).absolute()
    drop_old_copies("reader")
    mirror = RunMirror(where, scratch(where, "reader"))
    mirror.fetch()
    return mirror.local


def publish_files(uri: str, local: Path, folder: Path) -> None:
    """Upload a folder of a run's copy, without the run's lock."""
    storage = Storage(uri)
    for path in sorted(folder.iterdir()):
        storage.upload(path, path.relative_to(local).as_posix())


def _stamp(path: Path) -> Stamp:
    status = path.stat()
    return Stamp(status.st_size, status.st_mtime_ns)


@contextmanager
def only_one(path: Path) -> Iterator[None]:
    """Hold the lock file `path` against other processes of this node."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
