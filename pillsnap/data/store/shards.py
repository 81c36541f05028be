"""The decode-once store: encoded windows of a task's samples in memory-mapped shards.

    <store>/<manifest hash>-<task>-<split>-<transform>/
        store.json                              description, for people
        windows-9f86d0818c52b1ef1a2b.arrow      Arrow file, named by the first 20 digits of its sha256

A shard is written atomically under a name derived from its content: a task that Ray runs twice writes the same file
again, and damage is detected from the name. Each shard contains its own keys; there is no separate index.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import pyarrow as pa

from pillsnap.data.store.shard_files import ShardFolder, shard_folder, shard_name
from pillsnap.data.windows import EncodedWindow
from pillsnap.errors import UserError

DESCRIPTION_NAME = "store.json"
_GEOMETRY = ("left", "top", "scale_x", "scale_y")
_SCHEMA = pa.schema([("key", pa.uint64()), ("data", pa.large_binary()), *((name, pa.float64()) for name in _GEOMETRY)])


@dataclass(frozen=True)
class ShardStore:
    """Windows by key in a local folder or under a URI; small enough to be sent with every Ray Data task."""

    folder: str

    def get(self, key: int) -> EncodedWindow | None:
        """The window of a key; None when it is not stored."""
        return self.find(np.array([key], np.uint64))[0]

    def find(self, keys: np.ndarray) -> list[EncodedWindow | None]:
        """The windows of `keys` (n,) uint64, as views of the mapped shards; None for one that is not stored."""
        return _contents(self).find(keys)

    def refresh(self) -> None:
        """Map shards that were written since the last call, and forget those removed. Raises UserError for a damaged
        one.
        """
        _contents(self).refresh()

    def stored(self, keys: np.ndarray) -> np.ndarray:
        """Whether each of `keys` (n,) uint64 is stored: (n,) bool."""
        self.refresh()
        known = _contents(self).keys
        if not len(known):
            return np.zeros(len(keys), bool)
        return known[np.minimum(known.searchsorted(keys), len(known) - 1)] == keys

    def append(self, windows: Iterable[tuple[int, EncodedWindow]]) -> str:
        """Commit one shard of (key, window); returns its name. Raises UserError when it cannot be written."""
        rows = sorted(windows, key=lambda row: row[0])
        columns = {
            "key": pa.array([key for key, _ in rows], pa.uint64()),
            "data": [bytes(window.data) for _, window in rows],
        } | {name: [getattr(window, name) for _, window in rows] for name in _GEOMETRY}
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, _SCHEMA) as writer:
            writer.write_batch(pa.record_batch(columns, schema=_SCHEMA))
        data = sink.getvalue()
        name = shard_name(data)
        try:
            shard_folder(self.folder).write(name, data)
        except OSError as error:
            raise UserError(
                f"The store {self.folder} cannot be written ({error.strerror or error}): free disk space, set another "
                "folder with data.store_dir, or disable the store with data.store=off."
            ) from None
        return name

    def shards(self) -> dict[str, int]:
        """Sizes in bytes of the complete shards, by name."""
        return shard_folder(self.folder).sizes()

    def damaged(self) -> list[str]:
        """Names of shards whose content does not match their name; reads all bytes."""
        folder = shard_folder(self.folder)
        return [name for name in sorted(folder.sizes()) if not _is_sound(folder, name)]

    def remove(self, name: str | None = None) -> None:
        """Delete one shard, or the whole store."""
        _contents.cache_clear()
        shard_folder(self.folder).remove(name)


def _is_sound(folder: ShardFolder, name: str) -> bool:
    try:
        return shard_name(folder.local(name).read_bytes()) == name
    except OSError:
        return False


@lru_cache(maxsize=4)
def _contents(store: ShardStore) -> _Contents:
    contents = _Contents(shard_folder(store.folder))
    contents.refresh()
    return contents


def _no_keys() -> tuple[np.ndarray, np.ndarray]:
    return np.zeros(0, np.uint64), np.zeros((0, 2), np.int32)


@dataclass
class _Contents:
    """The mapped shards of a store in this process, and the shard and row of each key."""

    folder: ShardFolder
    _index: tuple[np.ndarray, np.ndarray] = field(default_factory=_no_keys)
    """Sorted keys, and the shard and row of each."""
    _shards: list[_Shard] = field(default_factory=list)
    _names: set[str] = field(default_factory=set)

    @property
    def keys(self) -> np.ndarray:
        return self._index[0]

    def refresh(self) -> None:
        names = self.folder.names()
        if names is None:
            return
        if not self._names <= set(names):  # removed ones are made again, also by a process that has them mapped
            self._index, self._shards, self._names = _no_keys(), [], set()
        new = [name for name in names if name not in self._names]
        if not new:
            return
        keys, positions = [self._index[0]], [self._index[1]]
        for name in new:
            shard = _Shard(self.folder, name)
            rows = np.arange(len(shard.keys), dtype=np.int32)
            keys.append(shard.keys)
            positions.append(np.stack([np.full_like(rows, len(self._shards)), rows], axis=1))
            self._shards.append(shard)
            self._names.add(name)
        together = np.concatenate(keys)
        order = np.argsort(together, kind="stable")
        self._index = together[order], np.concatenate(positions)[order]

    def find(self, wanted: np.ndarray) -> list[EncodedWindow | None]:
        keys, shards_and_rows = self._index
        if not len(keys):
            return [None] * len(wanted)
        nearest = np.minimum(keys.searchsorted(wanted), len(keys) - 1)
        is_stored = (keys[nearest] == wanted).tolist()
        return [
            self._shards[shard].window(row) if stored else None
            for stored, (shard, row) in zip(is_stored, shards_and_rows[nearest].tolist(), strict=True)
        ]


class _Shard:
    """One memory-mapped shard. Raises UserError when it is damaged."""

    def __init__(self, folder: ShardFolder, name: str) -> None:
        try:
            with pa.memory_map(str(folder.local(name))) as source:
                batch = pa.ipc.open_file(source).get_batch(0)
            if not batch.schema.equals(_SCHEMA):
                raise pa.ArrowInvalid("it has other columns")
        except (pa.ArrowInvalid, OSError, IndexError) as error:
            raise UserError(
                f"The shard {name} of a store is damaged ({' '.join(str(error).split())[:120]}): "
                "`pillsnap prepare --verify` removes such shards, and makes them anew."
            ) from None
        self.keys = batch["key"].to_numpy()
        buffers = batch["data"].buffers()
        self._offsets = np.frombuffer(buffers[1], np.int64)[: len(batch) + 1].tolist()
        self._data = memoryview(buffers[2])
        self._geometry = np.stack([batch[name].to_numpy() for name in _GEOMETRY], axis=1).tolist()

    def window(self, row: int) -> EncodedWindow:
        return EncodedWindow(self._data[self._offsets[row] : self._offsets[row + 1]], *self._geometry[row])
