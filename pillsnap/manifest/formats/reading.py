"""Reads sizes of photos and the bytes of their labels."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from pillsnap.errors import UserError
from pillsnap.observe.work_progress import Progress, unseen
from pillsnap.photos.decode import BadImage, read_header
from pillsnap.photos.files import open_photo

_CHUNK = 1000
_LABEL_BYTES = 1 << 16
_HEADER_BYTES = (4 << 10, 1 << 18)
"""Bytes read at first for the size, and at second where a colour profile precedes it; then the whole file."""


class Read(NamedTuple):
    """A photo's upright size in pixels, or the reason why it cannot be read, and the bytes of its label file."""

    problem: str
    width: int
    height: int
    label: bytes


def read_photos(root: Path, jobs: Sequence[tuple[str, str]], progress: Progress = unseen) -> Iterator[Read]:
    """Size and label per job (photo under `root`, path of its label file or ""), in order.

    Raises UserError for a label that cannot be read. In one process: starting others takes as long as reading.
    """
    base = os.fspath(root)
    for done, (photo, label) in enumerate(jobs, start=1):
        if done % _CHUNK == 0:
            progress("photos", done, len(jobs))
        yield _read(base, photo, label)


def _read(root: str, photo: str, label: str) -> Read:
    try:
        width, height = photo_size(root, photo)
    except BadImage as error:
        return Read(error.reason, 0, 0, b"")
    return Read("", width, height, _label(label) if label else b"")


def _label(path: str) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return b"".join(iter(partial(os.read, descriptor, _LABEL_BYTES), b""))
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UserError(f"{path}: cannot be read as text ({error.__class__.__name__})") from error


def photo_size(root: str, photo: str) -> tuple[int, int]:
    """(width, height) of the upright photo in pixels. Raises BadImage as training would."""
    descriptor = open_photo(root, photo)
    try:
        size = os.fstat(descriptor).st_size
        for num_bytes in (*_HEADER_BYTES, size):
            try:
                header = read_header(os.pread(descriptor, min(num_bytes, size), 0))
                return header.width, header.height
            except BadImage as error:
                if error.reason != "truncated" or num_bytes >= size:
                    raise
        raise AssertionError("the last read has the whole file")
    finally:
        os.close(descriptor)
