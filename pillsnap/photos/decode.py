"""The only photo decoder: bytes of a PNG or JPEG -> upright RGB uint8, with limits and typed errors."""

from __future__ import annotations

import io
import struct
import warnings
from dataclasses import dataclass

import numpy as np

from pillsnap.errors import UserError

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
DEFAULT_MAX_PIXELS = 64_000_000
PHOTO_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif", ".mpo",
    ".heic", ".heif", ".avif",
)  # fmt: skip
"""Endings of files that are taken for photos where folders are listed; the content decides how they are read."""
_PNG_RGB = 2
_EXIF_ORIENTATION = 0x0112
_TRANSPOSED = (5, 6, 7, 8)


class BadImage(UserError):
    """Bytes that cannot be decoded. `reason` is one of: empty, not_an_image, too_large, truncated, corrupt."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[BadImage], tuple[str, str]]:
        return BadImage, (self.reason, self.detail)


@dataclass(frozen=True)
class Header:
    """Contents of an image header; `width` and `height` are those of the upright image, in pixels."""

    format: str
    width: int
    height: int
    plain: bool
    """8-bit RGB PNG or upright three-component JPEG: decoded by the fast decoders, all others by Pillow."""


def read_header(data: bytes) -> Header:
    """Header of PNG or JPEG bytes, without decoding a pixel. Raises BadImage."""
    if not data:
        raise BadImage("empty", "the file has no bytes")
    if data[:8] == PNG_SIGNATURE:
        return _png_header(data)
    if data[:2] == b"\xff\xd8":
        return _jpeg_header(data)
    raise BadImage("not_an_image", f"neither PNG nor JPEG (starts with {data[:8]!r})")


def check_pixels(header: Header, max_pixels: int) -> None:
    """Raise BadImage (too_large) for more than `max_pixels`."""
    if header.width * header.height > max_pixels:
        raise BadImage("too_large", f"{header.width} x {header.height} is more than {max_pixels} pixels")


def decode_image(data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> np.ndarray:
    """Upright RGB pixels, uint8, shape (height, width, 3).

    Transparency is composited on white, 16-bit channels are scaled to 8 bits, CMYK and greyscale become RGB, and
    the EXIF orientation is applied. Raises BadImage; too_large is raised before any pixel is decoded.
    """
    header = read_header(data)
    check_pixels(header, max_pixels)
    if not header.plain:
        return _decode_with_pillow(data)
    if header.format == "png":
        return _decode_plain_png(data, header)
    return _decode_plain_jpeg(data, header)


def _decode_plain_png(data: bytes, header: Header) -> np.ndarray:
    from kornia_rs.io import decode_image_png_u8

    # The decoder stops at the last row and would accept a file that is cut after it.
    if b"IEND" not in data[-64:]:
        raise BadImage("truncated", "the PNG ends before its IEND chunk")
    try:
        return decode_image_png_u8(data, (header.height, header.width), "rgb")
    except Exception as error:  # the binding raises bare Exception for any decoding fault
        raise BadImage("corrupt", _one_line(error)) from None


def _decode_plain_jpeg(data: bytes, header: Header) -> np.ndarray:
    import cv2

    if b"\xff\xd9" not in data[-1024:]:
        raise BadImage("truncated", "the JPEG ends before its end-of-image marker")
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    if image is None or image.shape[:2] != (header.height, header.width):
        raise BadImage("corrupt", "the JPEG cannot be decoded")
    return image


def _decode_with_pillow(data: bytes) -> np.ndarray:
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the pixel limit was checked against the header
            image: Image.Image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG"))
            image.load()
            image = ImageOps.exif_transpose(image)
    except UnidentifiedImageError as error:
        raise BadImage("corrupt", _one_line(error)) from None
    except (OSError, ValueError, SyntaxError, struct.error, MemoryError, Image.DecompressionBombError) as error:
        reason = "truncated" if "truncated" in str(error).lower() else "corrupt"
        raise BadImage(reason, _one_line(error)) from None
    if image.mode.startswith("I"):
        wide = np.asarray(image).astype(np.uint32)
        return np.repeat((wide * 255 // 65535).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba)
    return np.array(image.convert("RGB"))


def _png_header(data: bytes) -> Header:
    if len(data) < 29 or data[12:16] != b"IHDR":
        raise BadImage("truncated", "the PNG ends within its header")
    width, height, depth, colour = struct.unpack(">IIBB", data[16:26])
    if not width or not height:
        raise BadImage("corrupt", f"the PNG header says {width} x {height}")
    head = data[: min(len(data), 4096)]
    special = b"tRNS" in head or b"eXIf" in head
    return Header("png", width, height, plain=depth == 8 and colour == _PNG_RGB and not special)


def _jpeg_header(data: bytes) -> Header:
    position, orientation = 2, 1
    while position + 4 <= len(data):
        if data[position] != 0xFF:
            raise BadImage("corrupt", f"no JPEG marker at byte {position}")
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        if marker in (0x01, *range(0xD0, 0xD8)):  # markers without a length
            position += 2
            continue
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        body = data[position + 4 : position + 2 + length]
        if marker == 0xE1 and body[:6] == b"Exif\0\0":
            orientation = _exif_orientation(body[6:])
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if len(body) < 6:
                break
            depth, height, width, components = struct.unpack(">BHHB", body[:6])
            if not width or not height:
                raise BadImage("corrupt", f"the JPEG header says {width} x {height}")
            if orientation in _TRANSPOSED:
                width, height = height, width
            return Header("jpeg", width, height, plain=depth == 8 and components == 3 and orientation == 1)
        if marker in (0xD9, 0xDA) or length < 2:
            break
        position += 2 + length
    raise BadImage("truncated", "the JPEG ends within its header")


def _exif_orientation(tiff: bytes) -> int:
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None or len(tiff) < 8:
        return 1
    (offset,) = struct.unpack(order + "I", tiff[4:8])
    if offset + 2 > len(tiff):
        return 1
    (entries,) = struct.unpack(order + "H", tiff[offset : offset + 2])
    for entry in range(entries):
        field = tiff[offset + 2 + 12 * entry : offset + 14 + 12 * entry]
        if len(field) == 12 and struct.unpack(order + "H", field[:2])[0] == _EXIF_ORIENTATION:
            return int(struct.unpack(order + "H", field[8:10])[0])
    return 1


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
