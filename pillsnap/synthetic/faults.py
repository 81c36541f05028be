"""Ten kinds of defective photos: half can be decoded nevertheless, half must be refused with a given reason."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Fault:
    """One kind of defect. `spoil` makes the file's bytes from RGB pixels (height, width, 3) uint8.

    `reason`: why the file cannot be decoded (see BadImage), empty if it can. Then the decoded pixels (with
    `halves` every second one) equal the original within `tolerance` grey levels on average.
    """

    extension: str
    reason: str
    spoil: Callable[[np.ndarray], bytes]
    tolerance: float = 0.0
    halves: bool = False


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """File bytes of a Pillow image."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """The start of an 8-bit RGB PNG of any size, with a few bytes after it."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + bytes(64)


def _png(pixels: np.ndarray) -> bytes:
    return encode(Image.fromarray(pixels))


def _cut_jpeg(pixels: np.ndarray) -> bytes:
    data = encode(Image.fromarray(pixels), "JPEG", quality=95)
    return data[: len(data) // 2]


def _exif_rotated(pixels: np.ndarray) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored rotated by 90 degrees to the left
    return encode(Image.fromarray(np.rot90(pixels)), "PNG", exif=exif)


def _palette(pixels: np.ndarray) -> bytes:
    """For images of at most 255 colours, which are exact; one more colour is transparent and unused."""
    colours, index = np.unique(pixels.reshape(-1, 3), axis=0, return_inverse=True)
    image = Image.fromarray(index.reshape(pixels.shape[:2]).astype(np.uint8))
    image.putpalette(colours.tobytes())
    return encode(image, transparency=bytes([255] * len(colours)))


FAULTS = {
    "cut_png": Fault(".png", "truncated", lambda pixels: _png(pixels)[:-40]),
    "cut_jpeg": Fault(".jpg", "truncated", _cut_jpeg),
    "empty": Fault(".png", "empty", lambda pixels: b""),
    "text": Fault(".png", "not_an_image", lambda pixels: b"not a photo at all\n"),
    "huge_header": Fault(".png", "too_large", lambda pixels: png_header(30_000, 30_000)),
    "wrong_size": Fault(".png", "", lambda pixels: _png(pixels.repeat(2, 0).repeat(2, 1)), halves=True),
    "cmyk": Fault(".jpg", "", lambda p: encode(Image.fromarray(p).convert("CMYK"), "JPEG", quality=98), tolerance=5.0),
    "exif_rotated": Fault(".png", "", _exif_rotated),
    "sixteen_bit": Fault(
        ".png", "", lambda p: cv2.imencode(".png", p[..., ::-1].astype(np.uint16) * 257)[1].tobytes(), tolerance=0.5
    ),
    "palette_with_alpha": Fault(".png", "", _palette),
}
"""The ten kinds, by name."""
