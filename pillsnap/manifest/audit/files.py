"""Inspects photo files in worker processes: existence, format, completeness, and hashes for comparison."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pillsnap.errors import UserError
from pillsnap.photos.archives import STORED, Place, parse_location, unpack_start
from pillsnap.photos.decode import BadImage, Header, check_pixels, decode_image, is_complete, other_format, read_header
from pillsnap.photos.files import MAX_PHOTO_BYTES, PhotoFile, PhotoStore, open_file
from pillsnap.storage import one_line

THUMBNAIL_PX = 32
_HEAD_BYTES = 4096
_JPEG_HEAD_BYTES = 1 << 20
_TAIL_BYTES = 1024
_DEFLATED_BYTES = 1 << 16
"""Compressed members up to this size are unpacked completely even without `deep`."""


@dataclass(frozen=True)
class Inspection:
    """Result for one file. `width`, `height`: pixels of the upright photo.

    `problem` is empty or one of: outside_root, missing, link, not_a_file, unreadable_file, too_large, empty,
    not_an_image, truncated, corrupt. `fingerprint`: hash of the whole file if inspected deeply, else of its size and
    ends. `frame_hash` (perceptual) and `thumbnail` (uint8 pixels): only if inspected deeply.
    """

    problem: str
    detail: str = ""
    width: int = 0
    height: int = 0
    fingerprint: bytes = b""
    frame_hash: bytes = b""
    thumbnail: bytes = b""


PhotoJob = tuple[str, list[list[float] | None]]
"""(location, see archives.py; boxes [x, y, w, h] in pixels)."""


def inspect_photos(root: str, jobs: Sequence[PhotoJob], deep: bool, max_pixels: int) -> list[Inspection]:
    """Inspect photos under `root`, in order. Bad files do not raise; links are not followed."""
    return [_inspect(root, location, boxes, deep, max_pixels) for location, boxes in jobs]


def _inspect(root: str, location: str, boxes: list[list[float] | None], deep: bool, max_pixels: int) -> Inspection:
    place = parse_location(location)
    try:
        file = open_file(root, location if place is None else place.archive)
    except BadImage as error:
        # The finding names the path; only an existing file that cannot be read has a further detail.
        return Inspection(error.reason, error.detail if error.reason == "unreadable_file" else "")
    with file:
        try:
            start, size = (0, file.size) if place is None else (place.offset, place.length)
            if size > MAX_PHOTO_BYTES:
                return Inspection("too_large", f"{size} bytes")
            if start + size > file.size:
                return Inspection("truncated", "the archive ends before the photo")
            if not deep and (place is None or place.compression == STORED):
                return _inspect_ends(file, start, size, max_pixels)
            if not deep and place is not None and size > _DEFLATED_BYTES:
                packed = file.read(_DEFLATED_BYTES, start)
                if not other_format(unpack_start(packed, place, 12)):  # other formats need the whole photo
                    return _inspect_deflated_head(file, place, packed, max_pixels)
            return _inspect_pixels(PhotoStore(root, max_pixels).read(location), boxes, max_pixels)
        except BadImage as error:
            return Inspection(error.reason, error.detail)
        except OSError as error:
            return Inspection("unreadable_file", os.strerror(error.errno) if error.errno else one_line(error))
        except UserError as error:
            return Inspection("corrupt", str(error))


def _inspect_ends(file: PhotoFile, start: int, size: int, max_pixels: int) -> Inspection:
    head = file.read(min(size, _HEAD_BYTES), start)
    try:
        header = read_header(head)
    except BadImage as error:
        # In a JPEG, a long colour profile or thumbnail may precede the size.
        if error.reason != "truncated" or size <= len(head):
            raise
        header = _read_more(file, start, size)
    check_pixels(header, max_pixels)
    tail = file.read(min(size, _TAIL_BYTES), start + max(0, size - _TAIL_BYTES))
    if header.format not in ("png", "jpeg"):
        decode_image(file.read(size, start), max_pixels=max_pixels)
    # Beyond the end mark there may be other bytes.
    elif not is_complete(tail, header) and not is_complete(file.read(size, start), header):
        raise BadImage("truncated", "the file ends before its end mark")
    return Inspection("", "", header.width, header.height, _hash_of_ends(head, tail, size))


def _read_more(file: PhotoFile, start: int, size: int) -> Header:
    try:
        return read_header(file.read(min(size, _JPEG_HEAD_BYTES), start))
    except BadImage as error:
        if error.reason != "truncated" or size <= _JPEG_HEAD_BYTES:
            raise
        return read_header(file.read(size, start))


def _inspect_deflated_head(file: PhotoFile, place: Place, packed: bytes, max_pixels: int) -> Inspection:
    """Check only the header of a compressed member; its end mark needs unpacking, which `deep` does."""
    start, size = place.offset, place.length
    header = read_header(unpack_start(packed, place, _JPEG_HEAD_BYTES))
    check_pixels(header, max_pixels)
    tail = file.read(_TAIL_BYTES, start + size - _TAIL_BYTES)
    return Inspection("", "", header.width, header.height, _hash_of_ends(packed[:_HEAD_BYTES], tail, size))


def _hash_of_ends(head: bytes, tail: bytes, size: int) -> bytes:
    return hashlib.blake2b(head + tail + size.to_bytes(8, "big"), digest_size=16).digest()


def _inspect_pixels(data: bytes, boxes: list[list[float] | None], max_pixels: int) -> Inspection:
    import cv2

    cv2.setNumThreads(1)
    image = decode_image(data, max_pixels=max_pixels)
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    height, width = grey.shape
    area = _pill_area(grey, [box for box in boxes if box is not None and len(box) == 4])
    thumbnail = cv2.resize(area, (THUMBNAIL_PX, THUMBNAIL_PX), interpolation=cv2.INTER_AREA)
    fingerprint = hashlib.blake2b(data, digest_size=16).digest()
    return Inspection("", "", width, height, fingerprint, _frame_hash(grey), thumbnail.tobytes())


def _frame_hash(grey: np.ndarray) -> bytes:
    """Perceptual hash: the 255 lowest frequencies of the cosine transform of the frame, scaled to at most 127; int8.

    pHash (Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010) keeps one bit per value;
    on a plain background most of those bits are noise.
    """
    import cv2

    small = cv2.resize(grey, (64, 64), interpolation=cv2.INTER_AREA).astype(np.float32)
    lowest = cv2.dct(small)[:16, :16].ravel()[1:]
    return np.rint(lowest * (127 / max(float(np.abs(lowest).max()), 1e-6))).astype(np.int8).tobytes()


def _pill_area(grey: np.ndarray, boxes: list[list[float]]) -> np.ndarray:
    """The bounding box of all boxes; the whole frame if there is none or it is tiny."""
    height, width = grey.shape
    corners = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    corners = corners[np.isfinite(corners).all(axis=1)]
    if len(corners):
        left, top = np.clip(corners[:, :2].min(axis=0), 0, [width - 1, height - 1]).astype(int)
        right, bottom = np.clip((corners[:, :2] + corners[:, 2:]).max(axis=0), 0, [width, height]).astype(int)
        if right - left >= 8 and bottom - top >= 8:
            return grey[top:bottom, left:right]
    return grey
