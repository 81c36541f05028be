"""Sources of a recipe's windows: photos, the decode-once store, or bytes sent by a Ray Data task."""

from __future__ import annotations

import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import pyarrow as pa

from pillsnap.data.store.shards import ShardStore
from pillsnap.data.windows import Codec, EncodedWindow, Photo, Window, whole
from pillsnap.photos.decode import BadImage, Scale
from pillsnap.photos.reader import PhotoReader, ReadAhead

Shipped = Mapping[int, EncodedWindow | BadImage | None]
"""Windows of a slot by sample number; None for one in the store."""


class Cutter(Hashable, Protocol):
    """Cuts the part of a photo that a recipe needs."""

    def needed(self, samples: pa.Table, number: int, training: bool) -> Scale: ...

    def cut(self, photo: Window, samples: pa.Table, number: int, training: bool, codec: Codec) -> Window:
        """`photo` is the whole photo, reduced no further than `needed`."""
        ...

    def keys(self, samples: pa.Table) -> np.ndarray:
        """(n,) uint64; samples with different windows have different keys."""
        ...


@dataclass(frozen=True)
class SplitStore:
    """The store of one split of a task, and how its windows are cut; sent with every task that reads it."""

    shards: ShardStore
    cutter: Cutter
    codec: Codec
    training: bool
    read_only: bool = False
    """Whether windows that are missing are not added."""

    def source(self, reader: PhotoReader, keys: KeyMemo | None = None) -> StoreSource:
        """Windows from this store, or from the photo when it is missing there."""
        self.shards.refresh()
        return StoreSource(reader, store=self, keys=keys or KeyMemo(self.cutter))


class KeyMemo:
    """The keys of one table's samples, each computed once."""

    def __init__(self, cutter: Cutter) -> None:
        self._cutter = cutter
        self._keys = np.zeros(0, np.uint64)
        """0 where not computed yet."""

    def of(self, samples: pa.Table, numbers: np.ndarray) -> np.ndarray:
        """Keys (n,) uint64 of the samples `numbers` (n,)."""
        if not len(self._keys):
            self._keys = np.zeros(len(samples), np.uint64)
        new = numbers[self._keys[numbers] == 0]
        if len(new):
            self._keys[new] = self._cutter.keys(samples.take(new))
        return self._keys[numbers]


@dataclass
class FetchTimes:
    """Seconds spent reading and decoding the windows of one batch."""

    read_s: float = 0.0
    decode_s: float = 0.0


@dataclass
class Source:
    """Windows of samples by number, from their photos. Not thread-safe.

    `prefetch` the samples of a batch, then call `window` for each.
    """

    reader: PhotoReader
    _ahead: ReadAhead | None = None
    _locations: dict[int, str] = field(default_factory=dict)
    """Locations of prefetched samples: Arrow needs several microseconds per single value."""

    def prefetch(self, samples: pa.Table, numbers: Sequence[int]) -> None:
        """Look up the samples of the next batch, and start reading their photos if these are remote."""
        self._locations = {}
        if not numbers:
            return
        locations = samples["location"].take(pa.array(numbers, pa.int64())).to_pylist()
        self._locations = dict(zip(numbers, locations, strict=True))
        if self.reader.is_remote:
            self._ahead = ReadAhead(self.reader, locations)

    def _photos(self) -> ReadAhead | PhotoReader:
        return self._ahead or self.reader

    def _location(self, samples: pa.Table, number: int) -> str:
        return self._locations.get(number) or samples["location"][number].as_py()

    def fetch(self, samples: pa.Table, number: int) -> EncodedWindow | BadImage:
        """The encoded window of a sample, or why it cannot be read."""
        data = self._photos().read_bytes(self._location(samples, number))
        return data if isinstance(data, BadImage) else EncodedWindow(data, own=False)

    def has_all(self, samples: pa.Table, numbers: np.ndarray) -> bool:
        """Whether the windows of all samples `numbers` (n,) are in a store."""
        return False

    def window(self, samples: pa.Table, number: int, times: FetchTimes, needed: Scale = whole) -> Window | BadImage:
        """The decoded window of a sample, from a photo at the size that is `needed`, or why it cannot be decoded. Adds
        the elapsed seconds to `times`.
        """
        started_s = time.perf_counter()
        encoded = self.fetch(samples, number)
        fetched_s = time.perf_counter()
        times.read_s += fetched_s - started_s
        if isinstance(encoded, BadImage):
            return encoded
        try:
            return encoded.decode(self.reader.max_pixels, needed)
        except BadImage as error:
            return error
        finally:
            times.decode_s += time.perf_counter() - fetched_s


@dataclass
class StoreSource(Source):
    """Windows from the store. A missing one is cut from its photo and encoded, so its pixels are the same."""

    store: SplitStore = field(kw_only=True)
    keys: KeyMemo = field(kw_only=True)
    fresh: list[tuple[int, EncodedWindow]] = field(default_factory=list)
    """(key, window) cut here and not yet in the store."""
    _looked_up: dict[int, tuple[int, EncodedWindow | None]] = field(default_factory=dict)
    """Key and stored window of prefetched samples: one look-up of many costs little more than of one."""
    _photo: tuple[str, Photo | BadImage] | None = None

    def prefetch(self, samples: pa.Table, numbers: Sequence[int]) -> None:
        self._looked_up = self._look_up(samples, numbers)
        super().prefetch(samples, [number for number, (_, stored) in self._looked_up.items() if stored is None])

    def fetch(self, samples: pa.Table, number: int) -> EncodedWindow | BadImage:
        store = self.store
        key, stored = self._looked_up.get(number) or self._look_up(samples, [number])[number]
        if stored is not None:
            return stored
        photo = self._read(self._location(samples, number))
        if isinstance(photo, BadImage):
            return photo
        try:
            decoded = photo.window(store.cutter.needed(samples, number, store.training))
        except BadImage as error:
            return error
        made = store.cutter.cut(decoded, samples, number, store.training, store.codec).encode(store.codec)
        self.fresh.append((key, made))
        return made

    def has_all(self, samples: pa.Table, numbers: np.ndarray) -> bool:
        return bool(self.store.shards.stored(self.keys.of(samples, numbers)).all())

    def flush(self) -> None:
        """Commit the windows in `fresh` to the store, unless it is read only."""
        if self.fresh and not self.store.read_only:
            self.store.shards.append(self.fresh)
            self.fresh = []

    def _look_up(self, samples: pa.Table, numbers: Sequence[int]) -> dict[int, tuple[int, EncodedWindow | None]]:
        keys = self.keys.of(samples, np.array(numbers, np.int64))
        found = self.store.shards.find(keys)
        return dict(zip(numbers, zip(keys.tolist(), found, strict=True), strict=True))

    def _read(self, location: str) -> Photo | BadImage:
        # Filling a store decodes each photo once: its pills are consecutive in the sample table.
        if self._photo is None or self._photo[0] != location:
            data = self._photos().read_bytes(location)
            photo = data if isinstance(data, BadImage) else Photo(data, self.reader.max_pixels)
            self._photo = location, photo
        return self._photo[1]


@dataclass
class ShippedSource(Source):
    """Windows sent as bytes; a window sent as None is fetched from `store`."""

    shipped: Shipped = field(kw_only=True)
    store: Source = field(kw_only=True)

    def prefetch(self, samples: pa.Table, numbers: Sequence[int]) -> None:
        self.store.prefetch(samples, [number for number in numbers if self.shipped[number] is None])

    def fetch(self, samples: pa.Table, number: int) -> EncodedWindow | BadImage:
        window = self.shipped[number]
        return self.store.fetch(samples, number) if window is None else window
