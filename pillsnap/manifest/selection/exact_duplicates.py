"""Finds byte-identical photos."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from pillsnap.observe.work_progress import Progress, unseen
from pillsnap.photos.archives import parse_location
from pillsnap.photos.decode import BadImage, is_photo_start
from pillsnap.photos.files import PhotoStore, open_photo

_HEAD_BYTES, _TAIL_BYTES = 4096, 1024
_CHUNK = 500
_PROCESSES_FROM = 20_000
"""Number of photos from which worker processes are faster despite their start."""


def find_exact_duplicates(
    root: str, locations: Sequence[str], num_workers: int | None = None, progress: Progress = unseen
) -> list[list[int]]:
    """Indices of photos with equal bytes, each list of two or more, in the order of the first.

    Only photos that share size, first and last bytes with another are read completely. Unreadable photos are skipped.
    """
    fingerprints: list[bytes] = []
    chunks = [list(locations[start : start + _CHUNK]) for start in range(0, len(locations), _CHUNK)]
    workers = num_workers or os.cpu_count() or 1

    def add(part: list[bytes]) -> None:
        fingerprints.extend(part)
        progress("duplicates", len(fingerprints), len(locations))

    if workers == 1 or len(locations) < _PROCESSES_FROM:
        for chunk in chunks:
            add(fingerprints_of(root, chunk))
    else:
        with ProcessPoolExecutor(workers, mp_context=get_context("forkserver")) as pool:
            for part in pool.map(fingerprints_of, [root] * len(chunks), chunks):
                add(part)
    return confirm_duplicates(root, locations, fingerprints)


def confirm_duplicates(root: str, locations: Sequence[str], fingerprints: Sequence[bytes]) -> list[list[int]]:
    """As find_exact_duplicates, among photos with equal fingerprints."""
    suspects = [index for members in group_equal(fingerprints) for index in members]
    store = PhotoStore(root)
    hashes = [b""] * len(fingerprints)
    for index in suspects:
        try:
            hashes[index] = hashlib.blake2b(store.read(locations[index]), digest_size=16).digest()
        except BadImage:
            continue
    return group_equal(hashes)


def group_equal(fingerprints: Sequence[bytes]) -> list[list[int]]:
    """Indices of equal fingerprints, each list of two or more, in the order of the first; empty ones are skipped."""
    groups: dict[bytes, list[int]] = defaultdict(list)
    for index, fingerprint in enumerate(fingerprints):
        if fingerprint:
            groups[fingerprint].append(index)
    return [members for members in groups.values() if len(members) > 1]


def fingerprints_of(root: str, locations: Sequence[str]) -> list[bytes]:
    """A hash of size, first and last bytes per photo as stored; empty for a file that is not a photo."""
    return [_fingerprint(root, location) for location in locations]


def _fingerprint(root: str, location: str) -> bytes:
    place = parse_location(location)
    try:
        descriptor = open_photo(root, location if place is None else place.archive)
    except BadImage:
        return b""
    try:
        start, size = (0, os.fstat(descriptor).st_size) if place is None else (place.offset, place.length)
        head = os.pread(descriptor, min(size, _HEAD_BYTES), start)
        if (place is None or not place.compression) and not is_photo_start(head):
            return b""
        tail = os.pread(descriptor, min(size, _TAIL_BYTES), start + max(0, size - _TAIL_BYTES))
    except OSError:
        return b""
    finally:
        os.close(descriptor)
    return hashlib.blake2b(head + tail + size.to_bytes(8, "big"), digest_size=16).digest()
