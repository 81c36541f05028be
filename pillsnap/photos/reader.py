"""Reads photos by location: bytes or RGB pixels, or a BadImage that says why not. Nothing here raises for a bad photo.

`PhotoReader` is sent to Ray Data tasks and decode workers. `ReadAhead` reads several remote photos concurrently.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pillsnap.photos.decode import BadImage, decode_image
from pillsnap.photos.files import PhotoStore
from pillsnap.storage import is_uri

_READS_AT_ONCE = 8
"""Concurrent reads of one process from remote storage."""


@dataclass(frozen=True)
class PhotoReader:
    """Photos under a data root (a folder or URI); larger ones than `max_pixels` are refused."""

    data_root: str
    max_pixels: int

    @property
    def is_remote(self) -> bool:
        """Whether the data root is a URI, not a mounted folder."""
        return is_uri(self.data_root)

    def read(self, location: str) -> np.ndarray | BadImage:
        """RGB pixels (height, width, 3) uint8, or why there are none."""
        return self.decode(self.read_bytes(location))

    def decode(self, data: bytes | BadImage) -> np.ndarray | BadImage:
        """RGB pixels (height, width, 3) uint8 of a photo's bytes, or why there are none."""
        if isinstance(data, BadImage):
            return data
        try:
            return decode_image(data, max_pixels=self.max_pixels)
        except BadImage as error:
            return error

    def read_bytes(self, location: str) -> bytes | BadImage:
        """The file's bytes, or why there are none."""
        try:
            return PhotoStore(self.data_root, self.max_pixels).read(location)
        except BadImage as error:
            return error
        except FileNotFoundError:
            return BadImage("missing", f"{location} is not there")
        except (OSError, ValueError) as error:
            return BadImage("unreadable", str(error))


class ReadAhead:
    """Reads given photos in the background, several at a time, if storage is remote; else each when requested."""

    def __init__(self, reader: PhotoReader, locations: Iterable[str]) -> None:
        self._reader = reader
        self._pending: dict[str, Future[bytes | BadImage]] = {}
        if reader.is_remote:
            self._pending = {path: _readers().submit(reader.read_bytes, path) for path in dict.fromkeys(locations)}

    def read_bytes(self, location: str) -> bytes | BadImage:
        """As in PhotoReader."""
        pending = self._pending.get(location)
        return self._reader.read_bytes(location) if pending is None else pending.result()

    def read(self, location: str) -> np.ndarray | BadImage:
        """As in PhotoReader."""
        return self._reader.decode(self.read_bytes(location))


@lru_cache(maxsize=1)
def _readers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_READS_AT_ONCE, "photos")
