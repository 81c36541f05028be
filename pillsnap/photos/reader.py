"""TODO docstring."""

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
"""Of a task, from remote storage."""


@dataclass(frozen=True)
class PhotoReader:
    """Photos beneath a data root."""

    data_root: str
    max_pixels: int

    @property
    def is_remote(self) -> bool:
        """Whether photos come over a network, from storage that is not mounted."""
        return is_uri(self.data_root)

    def read(self, image_path: str) -> np.ndarray | BadImage:
        """RGB pixels, or why there are none."""
        return self.decode(self.read_bytes(image_path))

    def decode(self, data: bytes | BadImage) -> np.ndarray | BadImage:
        """RGB pixels of a photo's bytes, or why there are none."""
        if isinstance(data, BadImage):
            return data
        try:
            return decode_image(data, max_pixels=self.max_pixels)
        except BadImage as error:
            return error

    def read_bytes(self, image_path: str) -> bytes | BadImage:
        """The file's bytes, or why there are none."""
        try:
            return PhotoStore(self.data_root, self.max_pixels).read(image_path)
        except BadImage as error:
            return error
        except FileNotFoundError:
            return BadImage("missing", f"{image_path} is not there")
        except (OSError, ValueError) as error:
            return BadImage("unreadable", str(error))


class ReadAhead:
    """Photos that will be asked for one after the other. From remote storage, where a read is mostly waiting, several
    are read at a time.
    """

    def __init__(self, reader: PhotoReader, image_paths: Iterable[str]) -> None:
        self._reader = reader
        self._coming: dict[str, Future[bytes | BadImage]] = {}
        if reader.is_remote:
            self._coming = {path: _readers().submit(reader.read_bytes, path) for path in dict.fromkeys(image_paths)}

    def read_bytes(self, image_path: str) -> bytes | BadImage:
        """As the reader's."""
        coming = self._coming.get(image_path)
        return self._reader.read_bytes(image_path) if coming is None else coming.result()

    def read(self, image_path: str) -> np.ndarray | BadImage:
        """As the reader's."""
        return self._reader.decode(self.read_bytes(image_path))


@lru_cache(maxsize=1)
def _readers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_READS_AT_ONCE, "photos")
