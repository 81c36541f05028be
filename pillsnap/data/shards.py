"""The decode-once store: encoded windows of a task's samples in shards that are read through memory mapping.

    <store>/<manifest hash>-<task>-<split>-<transform>/
        store.json                              what is in here, for people
        windows-9f86d0818c52b1ef1a2b.arrow      Arrow file, named by the first 20 digits of its sha256

A shard is written under a temporary name, synced, and renamed to the name that its content gives it. So a shard is
whole or absent, a task that Ray runs twice writes the same file again, and the name alone tells damage. Which sample
lies where is in the shards themselves: there is no index to lose.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa

from pillsnap.data.windows import EncodedWindow
from pillsnap.errors import UserError

DESCRIPTION_NAME = "store.json"
_PREFIX, _SUFFIX, _DIGITS = "windows-", ".arrow", 20
_PLACE = ("left", "top", "scale_x", "scale_y")
_SCHEMA = pa.schema([("key", pa.uint64()), ("data", pa.large_binary()), *((name, pa.float64()) for name in _PLACE)])


@dataclass(frozen=True)
class ShardStore:
    """Windows by key in one folder; small enough to travel with every Ray Data task."""

    folder: str

    def get(self, key: int) -> EncodedWindow | None:
        """The window of that key, its bytes a view of the mapped shard; None when it is not stored."""
        return _contents(self).get(key)

    def refresh(self) -> None:
        """Look for shards that were written since."""
        _contents(self).refresh()

    def stored(self, keys: np.ndarray) -> np.ndarray:
        """Which of the keys (n,) uint64 are stored: (n,) bool."""
        self.refresh()
        return np.isin(keys, _contents(self).keys)

    def append(self, windows: Iterable[tuple[int, EncodedWindow]]) -> Path:
        """Commit one shard of (key, window). Raises UserError when it cannot be written."""
        rows = sorted(windows, key=lambda row: row[0])
        columns = {
            "key": pa.array([key for key, _ in rows], pa.uint64()),
            "data": [bytes(window.data) for _, window in rows],
        } | {name: [getattr(window, name) for _, window in rows] for name in _PLACE}
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, _SCHEMA) as writer:
            writer.write_batch(pa.record_batch(columns, schema=_SCHEMA))
        data = sink.getvalue()
        name = f"{_PREFIX}{hashlib.sha256(data).hexdigest()[:_DIGITS]}{_SUFFIX}"
        path = Path(self.folder, name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, data)
        except OSError as error:
            raise UserError(
                f"The store {self.folder} cannot be written ({error.strerror}): free disk space, name another place "
                "with data.store_dir, or do without with data.store=off."
            ) from None
        return path

    def shards(self) -> list[Path]:
        """Its complete shards."""
        return sorted(Path(self.folder).glob(f"{_PREFIX}*{_SUFFIX}"))

    def num_bytes(self) -> int:
        """Size on disk."""
        return sum(path.stat().st_size for path in self.shards())

    def damaged(self) -> list[Path]:
        """Shards whose content is not what their name says; reads every byte."""
        return [path for path in self.shards() if not _is_sound(path)]

    def remove(self) -> None:
        """Delete the store and everything in it."""
        _contents.cache_clear()
        shutil.rmtree(self.folder, ignore_errors=True)


def _is_sound(path: Path) -> bool:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return path.stem == f"{_PREFIX}{digest[:_DIGITS]}"


def _write(path: Path, data: pa.Buffer) -> None:
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@lru_cache(maxsize=4)
def _contents(store: ShardStore) -> _Contents:
    contents = _Contents(store)
    contents.refresh()
    return contents


@dataclass
class _Contents:
    """A process's view of a store: its mapped shards, and where each key lies."""

    store: ShardStore
    keys: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    """Sorted."""
    _places: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int32))
    """Shard and row of each key."""
    _shards: list[_Shard] = field(default_factory=list)
    _names: set[str] = field(default_factory=set)
    _changed_ns: int = -1

    def refresh(self) -> None:
        try:
            changed_ns = os.stat(self.store.folder).st_mtime_ns
        except FileNotFoundError:
            return
        if changed_ns == self._changed_ns:
            return
        self._changed_ns = changed_ns
        keys, places = [self.keys], [self._places]
        for name in sorted(set(os.listdir(self.store.folder)) - self._names):
            if name.startswith(_PREFIX) and name.endswith(_SUFFIX):
                shard = _Shard(Path(self.store.folder, name))
                rows = np.arange(len(shard.keys), dtype=np.int32)
                keys.append(shard.keys)
                places.append(np.stack([np.full_like(rows, len(self._shards)), rows], axis=1))
                self._shards.append(shard)
                self._names.add(name)
        together = np.concatenate(keys)
        order = np.argsort(together, kind="stable")
        self.keys, self._places = together[order], np.concatenate(places)[order]

    def get(self, key: int) -> EncodedWindow | None:
        position = int(self.keys.searchsorted(np.uint64(key)))
        if position == len(self.keys) or self.keys[position] != key:
            return None
        shard, row = self._places[position].tolist()
        return self._shards[shard].window(row)


class _Shard:
    """One memory-mapped shard. Raises UserError when it is none."""

    def __init__(self, path: Path) -> None:
        try:
            with pa.memory_map(str(path)) as source:
                batch = pa.ipc.open_file(source).get_batch(0)
        except (pa.ArrowInvalid, OSError, IndexError) as error:
            raise UserError(
                f"{path} is damaged ({' '.join(str(error).split())[:120]}): "
                "`pillsnap prepare --verify` removes such shards, and makes them anew."
            ) from None
        assert batch.schema.equals(_SCHEMA)
        self.keys = batch["key"].to_numpy()
        buffers = batch["data"].buffers()
        self._offsets = np.frombuffer(buffers[1], np.int64)[: len(batch) + 1]
        self._data = memoryview(buffers[2])
        self._place = np.stack([batch[name].to_numpy() for name in _PLACE], axis=1).tolist()

    def window(self, row: int) -> EncodedWindow:
        return EncodedWindow(self._data[self._offsets[row] : self._offsets[row + 1]], *self._place[row])
