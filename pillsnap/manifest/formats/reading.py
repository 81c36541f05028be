"""Reads sizes of photos and text labels."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from pillsnap.errors import UserError
from pillsnap.manifest.aihub import Progress
from pillsnap.photos.decode import BadImage, read_header
from pillsnap.photos.files import open_photo

_CHUNK = 1000
_HEADER_BYTES = (4 << 10, 1 << 18)
"""Bytes read at first for the size, and at second where a colour profile precedes it; then the whole file."""


class Read(NamedTuple):
    """A photo's upright size in pixels, or the reason why it cannot be read, and the rows of its label file."""

    problem: str
    width: int
    height: int
    rows: list[tuple[float, ...]]
    """(line number, numbers of the line)."""


def read_photos(root: Path, jobs: Sequence[tuple[str, str]], progress: Progress | None = None) -> Iterator[Read]:
    """Size and label rows per job (photo under `root`, path of its label file or ""), in order.

    Raises UserError for a malformed label file. In one process: sending rows between processes takes as long as reading
    them.
    """
    base = os.fspath(root)
    for done, (photo, label) in enumerate(jobs, start=1):
        if progress is not None and done % _CHUNK == 0:
            progress("photos", done, len(jobs))
        yield _read(base, photo, label)


def _read(root: str, photo: str, label: str) -> Read:
    try:
        width, height = photo_size(root, photo)
    except BadImage as error:
        return Read(error.reason, 0, 0, [])
    return Read("", width, height, _label_rows(label) if label else [])


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


def _label_rows(path: str) -> list[tuple[float, ...]]:
    try:
        with open(path, "rb") as file:
            text = file.read().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({error.__class__.__name__})") from error
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                rows.append((number, *map(float, line.split())))
            except ValueError as error:
                raise UserError(f"{path}: line {number}: not numbers: {line.strip()[:80]!r}") from error
    return rows
