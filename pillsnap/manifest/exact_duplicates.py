"""The same bytes under two names: which photos are copies of each other."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from pillsnap.manifest.aihub import Progress
from pillsnap.photos.archives import parse_location
from pillsnap.photos.decode import PNG_SIGNATURE, BadImage
from pillsnap.photos.files import PhotoStore, open_photo

_HEAD_BYTES, _TAIL_BYTES = 4096, 1024
_CHUNK = 500
_PROCESSES_FROM = 20_000
"""Photos from which worker processes pay for their start."""


def find_copies(
    root: str, locations: Sequence[str], num_workers: int | None = None, progress: Progress | None = None
) -> list[list[int]]:
    """Indices of photos with equal bytes, each list of two or more, in the order of the first.

    Only photos whose size and ends are those of another are read whole. What cannot be read is no copy.
    """
    marks: list[bytes] = []
    chunks = [list(locations[start : start + _CHUNK]) for start in range(0, len(locations), _CHUNK)]
    workers = num_workers or os.cpu_count() or 1

    def add(part: list[bytes]) -> None:
        marks.extend(part)
        if progress is not None:
            progress("copies", len(marks), len(locations))

    if workers == 1 or len(locations) < _PROCESSES_FROM:
        for chunk in chunks:
            add(hashes_of_ends(root, chunk))
    else:
        with ProcessPoolExecutor(workers, mp_context=get_context("forkserver")) as pool:
            for part in pool.map(hashes_of_ends, [root] * len(chunks), chunks):
                add(part)
    return equal_photos(root, locations, marks)


def equal_photos(root: str, locations: Sequence[str], marks: Sequence[bytes]) -> list[list[int]]:
    """As `find_copies`, among photos of equal marks."""
    suspects = [index for members in equal_marks(marks) for index in members]
    store = PhotoStore(root)
    hashes = [b""] * len(marks)
    for index in suspects:
        try:
            hashes[index] = hashlib.blake2b(store.read(locations[index]), digest_size=16).digest()
        except BadImage:
            continue
    return equal_marks(hashes)


def equal_marks(marks: Sequence[bytes]) -> list[list[int]]:
    """Indices of equal marks, each list of two or more, in the order of the first; an empty mark equals none."""
    alike: dict[bytes, list[int]] = defaultdict(list)
    for index, mark in enumerate(marks):
        if mark:
            alike[mark].append(index)
    return [members for members in alike.values() if len(members) > 1]


def hashes_of_ends(root: str, locations: Sequence[str]) -> list[bytes]:
    """A hash of size, first and last bytes of each photo as it is stored; empty for what is no photo."""
    return [_hash_of_ends(root, location) for location in locations]


def _hash_of_ends(root: str, location: str) -> bytes:
    place = parse_location(location)
    try:
        descriptor = open_photo(root, location if place is None else place.archive)
    except BadImage:
        return b""
    try:
        start, size = (0, os.fstat(descriptor).st_size) if place is None else (place.offset, place.length)
        head = os.pread(descriptor, min(size, _HEAD_BYTES), start)
        if (place is None or not place.compression) and not head.startswith((PNG_SIGNATURE, b"\xff\xd8")):
            return b""
        tail = os.pread(descriptor, min(size, _TAIL_BYTES), start + max(0, size - _TAIL_BYTES))
    except OSError:
        return b""
    finally:
        os.close(descriptor)
    return hashlib.blake2b(head + tail + size.to_bytes(8, "big"), digest_size=16).digest()
