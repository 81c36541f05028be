"""Where a recipe gets its windows from: photos, the decode-once store, or bytes that were shipped to it."""

from __future__ import annotations

import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import pyarrow as pa

from pillsnap.data.store.shards import ShardStore
from pillsnap.data.windows import Codec, EncodedWindow, Window
from pillsnap.photos.decode import BadImage
from pillsnap.photos.reader import PhotoReader, ReadAhead

Shipped = Mapping[int, EncodedWindow | BadImage | None]
"""The window of each of a slot's samples by its number; None where the store has it."""


class Cutter(Hashable, Protocol):
    """Cuts the part of a photo that a recipe needs of it."""

    def cut(self, photo: np.ndarray, samples: pa.Table, number: int, training: bool, codec: Codec) -> Window: ...

    def keys(self, samples: pa.Table) -> np.ndarray:
        """(n,) uint64 that differ for samples whose windows would."""
        ...


@dataclass(frozen=True)
class SplitStore:
    """The store of one split of a task, and how its windows are cut; travels with every task that reads it."""

    shards: ShardStore
    cutter: Cutter
    codec: Codec
    training: bool

    def source(self, reader: PhotoReader, keys: KeyMemo | None = None) -> StoreSource:
        """Windows from this store, and from photos where it lacks one."""
        self.shards.refresh()
        return StoreSource(reader, store=self, keys=keys or KeyMemo(self.cutter))


class KeyMemo:
    """The keys of one table's samples, each worked out once."""

    def __init__(self, cutter: Cutter) -> None:
        self._cutter = cutter
        self._keys = np.zeros(0, np.uint64)
        """0 where it is not known yet."""

    def of(self, samples: pa.Table, numbers: np.ndarray) -> np.ndarray:
        """Keys (n,) uint64 of the samples of those numbers (n,)."""
        if not len(self._keys):
            self._keys = np.zeros(len(samples), np.uint64)
        new = numbers[self._keys[numbers] == 0]
        if len(new):
            self._keys[new] = self._cutter.keys(samples.take(new))
        return self._keys[numbers]


@dataclass
class FetchTimes:
    """Seconds that one batch took to read and to decode its windows."""

    read_s: float = 0.0
    decode_s: float = 0.0


@dataclass
class Source:
    """Windows of samples by number. Not safe for use by two threads at a time."""

    reader: PhotoReader
    _ahead: ReadAhead | None = None
    _paths: dict[int, str] = field(default_factory=dict)
    """Of samples that were announced: Arrow takes several microseconds for every single value."""

    def expect(self, samples: pa.Table, numbers: Sequence[int]) -> None:
        """These samples will be asked for: their photos may be read beforehand."""
        self._paths = {}
        if not numbers:
            return
        paths = samples["location"].take(pa.array(numbers, pa.int64())).to_pylist()
        self._paths = dict(zip(numbers, paths, strict=True))
        if self.reader.is_remote:
            self._ahead = ReadAhead(self.reader, paths)

    def _photos(self) -> ReadAhead | PhotoReader:
        return self._ahead or self.reader

    def _path(self, samples: pa.Table, number: int) -> str:
        return self._paths.get(number) or samples["location"][number].as_py()

    def fetch(self, samples: pa.Table, number: int) -> EncodedWindow | BadImage:
        """The encoded window of a sample, or why there is none."""
        data = self._photos().read_bytes(self._path(samples, number))
        return data if isinstance(data, BadImage) else EncodedWindow(data, own=False)

    def has_all(self, samples: pa.Table, numbers: np.ndarray) -> bool:
        """Whether the windows of all these samples (n,) lie in a store."""
        return False

    def window(self, samples: pa.Table, number: int, times: FetchTimes) -> Window | BadImage:
        """The pixels of a sample's window, or the reason there are none. Adds the seconds it took to `times`."""
        started_s = time.perf_counter()
        encoded = self.fetch(samples, number)
        fetched_s = time.perf_counter()
        times.read_s += fetched_s - started_s
        if isinstance(encoded, BadImage):
            return encoded
        try:
            return encoded.decode(self.reader.max_pixels)
        except BadImage as error:
            return error
        finally:
            times.decode_s += time.perf_counter() - fetched_s


@dataclass
class StoreSource(Source):
    """Windows from the store; one that it lacks is cut from its photo and encoded, and so has the same pixels."""

    store: SplitStore = field(kw_only=True)
    keys: KeyMemo = field(kw_only=True)
    fresh: list[tuple[int, EncodedWindow]] = field(default_factory=list)
    """(key, window) made here, which the store lacks."""
    _expected: dict[int, tuple[int, EncodedWindow | None]] = field(default_factory=dict)
    """Key and stored window of samples that were announced: one look for many costs little more than for one."""
    _photo: tuple[str, np.ndarray | BadImage] | None = None

    def expect(self, samples: pa.Table, numbers: Sequence[int]) -> None:
        self._expected = self._look_up(samples, numbers)
        super().expect(samples, [number for number, (_, stored) in self._expected.items() if stored is None])

    def fetch(self, samples: pa.Table, number: int) -> EncodedWindow | BadImage:
        store = self.store
        key, stored = self._expected.get(number) or self._look_up(samples, [number])[number]
        if stored is not None:
            return stored
        photo = self._read(self._path(samples, number))
        if isinstance(photo, BadImage):
            return photo
        made = store.cutter.cut(photo, samples, number, store.training, store.codec).encode(store.codec)
        self.fresh.append((key, made))
        return made

    def has_all(self, samples: pa.Table, numbers: np.ndarray) -> bool:
        return bool(self.store.shards.stored(self.keys.of(samples, numbers)).all())

    def flush(self) -> None:
        """Commit the windows made here to the store."""
        if self.fresh:
            self.store.shards.append(self.fresh)
            self.fresh = []

    def _look_up(self, samples: pa.Table, numbers: Sequence[int]) -> dict[int, tuple[int, EncodedWindow | None]]:
        keys = self.keys.of(samples, np.array(numbers, np.int64))
        found = self.store.shards.find(keys)
        return dict(zip(numbers, zip(keys.tolist(), found, strict=True), strict=True))

    def _read(self, image_path: str) -> np.ndarray | BadImage:
        # The pills of one photo are neighbours in the sample table: filling a store decodes it once.
        if self._photo is None or self._photo[0] != image_path:
            self._photo = image_path, self._photos().read(image_path)
        return self._photo[1]


@dataclass
class ShippedSource(Source):
    """Windows that came as bytes; those that did not (None) are fetched from the store."""

    shipped: Shipped = field(kw_only=True)
    store: Source = field(kw_only=True)

    def expect(self, samples: pa.Table, numbers: Sequence[int]) -> None:
        self.store.expect(samples, [number for number in numbers if self.shipped[number] is None])

    def fetch(self, samples: pa.Table, number: int) -> EncodedWindow | BadImage:
        window = self.shipped[number]
        return self.store.fetch(samples, number) if window is None else window
