"""The decode-once store: encoded windows of a task's samples in shards that are read through memory mapping.

    <store>/<manifest hash>-<task>-<split>-<transform>/
        store.json                              what is in here, for people
        windows-9f86d0818c52b1ef1a2b.arrow      Arrow file, named by the first 20 digits of its sha256

A shard is committed whole under the name that its content gives it. So it is there or absent, a task that Ray runs
twice writes the same file again, and the name alone tells damage. Which window lies where is in the shards themselves:
there is no index to lose.
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
_PLACE = ("left", "top", "scale_x", "scale_y")
_SCHEMA = pa.schema([("key", pa.uint64()), ("data", pa.large_binary()), *((name, pa.float64()) for name in _PLACE)])


@dataclass(frozen=True)
class ShardStore:
    """Windows by key in one folder, local or a URI; small enough to travel with every Ray Data task."""

    folder: str

    def get(self, key: int) -> EncodedWindow | None:
        """The window of that key; None when it is not stored."""
        return self.find(np.array([key], np.uint64))[0]

    def find(self, keys: np.ndarray) -> list[EncodedWindow | None]:
        """The windows of the keys (n,) uint64, their bytes views of the mapped shards; None where one is not stored."""
        return _contents(self).find(keys)

    def refresh(self) -> None:
        """Look for shards that were written since. Raises UserError for one that is damaged."""
        _contents(self).refresh()

    def stored(self, keys: np.ndarray) -> np.ndarray:
        """Which of the keys (n,) uint64 are stored: (n,) bool."""
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
        } | {name: [getattr(window, name) for _, window in rows] for name in _PLACE}
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, _SCHEMA) as writer:
            writer.write_batch(pa.record_batch(columns, schema=_SCHEMA))
        data = sink.getvalue()
        name = shard_name(data)
        try:
            shard_folder(self.folder).write(name, data)
        except OSError as error:
            raise UserError(
                f"The store {self.folder} cannot be written ({error.strerror or error}): free disk space, name another "
                "place with data.store_dir, or do without with data.store=off."
            ) from None
        return name

    def shards(self) -> dict[str, int]:
        """Names of its complete shards, with their bytes."""
        return shard_folder(self.folder).sizes()

    def damaged(self) -> list[str]:
        """Shards whose content is not what their name says; reads every byte."""
        folder = shard_folder(self.folder)
        return [name for name in sorted(folder.sizes()) if not _is_sound(folder, name)]

    def remove(self, name: str | None = None) -> None:
        """Delete one shard, or the store with everything in it."""
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


@dataclass
class _Contents:
    """A process's view of a store: its mapped shards, and where each key lies."""

    folder: ShardFolder
    _index: tuple[np.ndarray, np.ndarray] = field(
        default_factory=lambda: (np.zeros(0, np.uint64), np.zeros((0, 2), np.int32))
    )
    """Sorted keys, and the shard and row of each."""
    _shards: list[_Shard] = field(default_factory=list)
    _names: set[str] = field(default_factory=set)

    @property
    def keys(self) -> np.ndarray:
        return self._index[0]

    def refresh(self) -> None:
        new = [name for name in self.folder.names() or () if name not in self._names]
        if not new:
            return
        keys, places = [self._index[0]], [self._index[1]]
        for name in new:
            shard = _Shard(self.folder, name)
            rows = np.arange(len(shard.keys), dtype=np.int32)
            keys.append(shard.keys)
            places.append(np.stack([np.full_like(rows, len(self._shards)), rows], axis=1))
            self._shards.append(shard)
            self._names.add(name)
        together = np.concatenate(keys)
        order = np.argsort(together, kind="stable")
        self._index = together[order], np.concatenate(places)[order]

    def find(self, asked: np.ndarray) -> list[EncodedWindow | None]:
        keys, places = self._index
        if not len(keys):
            return [None] * len(asked)
        positions = np.minimum(keys.searchsorted(asked), len(keys) - 1)
        there, shards_and_rows = (keys[positions] == asked).tolist(), places[positions].tolist()
        return [
            self._shards[shard].window(row) if is_there else None
            for is_there, (shard, row) in zip(there, shards_and_rows, strict=True)
        ]


class _Shard:
    """One memory-mapped shard. Raises UserError when it is none."""

    def __init__(self, folder: ShardFolder, name: str) -> None:
        try:
            with pa.memory_map(str(folder.local(name))) as source:
                batch = pa.ipc.open_file(source).get_batch(0)
        except (pa.ArrowInvalid, OSError, IndexError) as error:
            raise UserError(
                f"The shard {name} of a store is damaged ({' '.join(str(error).split())[:120]}): "
                "`pillsnap prepare --verify` removes such shards, and makes them anew."
            ) from None
        assert batch.schema.equals(_SCHEMA)
        self.keys = batch["key"].to_numpy()
        buffers = batch["data"].buffers()
        self._offsets = np.frombuffer(buffers[1], np.int64)[: len(batch) + 1].tolist()
        self._data = memoryview(buffers[2])
        self._place = np.stack([batch[name].to_numpy() for name in _PLACE], axis=1).tolist()

    def window(self, row: int) -> EncodedWindow:
        return EncodedWindow(self._data[self._offsets[row] : self._offsets[row + 1]], *self._place[row])
