"""The only photo decoder: bytes of a photo -> upright RGB uint8, with limits and typed errors.

PNG and JPEG are decoded by fast decoders, WebP, BMP, TIFF, GIF (the first frame), AVIF and HEIC (with the package
pillow-heif) by Pillow. The content decides, not the file's ending. A JPEG can be decoded at a half, a quarter or an
eighth of its size, by a smaller inverse DCT. `pillsnap export` copies this file beside models.
"""

from __future__ import annotations

import io
import re
import struct
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

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
_FROM_TOP_LEFT = (1, 5)
"""Orientations whose upright photo begins with the first stored pixel."""
REDUCTIONS = (8, 4, 2)
Scale = Callable[[int, int], float]
"""What a use needs of a photo of given width and height: the largest number of its own pixels per pixel of the photo,
along one axis.
"""
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1", b"heif")
_PNG_END = b"IEND\xaeB`\x82"
_JPEG_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
"""A marker other than those within the coded pixels: stuffed zeros and restarts."""


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
    """8-bit RGB PNG, or three-component JPEG: decoded by the fast decoders, all others by Pillow."""
    orientation: int = 1
    """EXIF orientation of the stored pixels, 1 to 8; applied by the decoder."""


def read_header(data: bytes) -> Header:
    """Header of a photo's bytes, without decoding a pixel. Raises BadImage.

    The start of a PNG or JPEG is enough; `truncated` says that it needs more. Other formats need the whole file.
    """
    if not data:
        raise BadImage("empty", "the file has no bytes")
    if data[:8] == PNG_SIGNATURE:
        return _png_header(data)
    if is_reducible(data):
        return _jpeg_header(data)
    name = other_format(data)
    if name:
        return _other_header(data, name)
    raise BadImage("not_an_image", f"no known format of photos (starts with {data[:8]!r})")


def other_format(data: bytes) -> str:
    """Pillow's name of the format that the first 12 bytes of a file begin, other than PNG and JPEG; else ""."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "GIF"
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "TIFF"
    if data[4:8] == b"ftyp":
        return "AVIF" if data[8:12] in (b"avif", b"avis") else "HEIF" if data[8:12] in _HEIF_BRANDS else ""
    return "BMP" if data[:2] == b"BM" else ""


def is_photo_start(data: bytes) -> bool:
    """Whether the first 12 bytes of a file begin a photo of a known format."""
    return data[:8] == PNG_SIGNATURE or data[:2] == b"\xff\xd8" or bool(other_format(data))


def is_complete(data: bytes, header: Header) -> bool:
    """Whether a PNG or JPEG has its end mark; other bytes may follow it, such as the film of a motion photo."""
    if header.format == "png":
        return data.rfind(_PNG_END) >= 0
    if header.format != "jpeg" or b"\xff\xd9" in data[-1024:]:
        return True
    position = 2
    while match := _JPEG_MARKER.search(data, position):
        marker = data[match.start() + 1]
        if marker == 0xD9:
            return True
        alone = marker in (0x01, 0xD8)
        position = match.end() + (0 if alone else int.from_bytes(data[match.end() : match.end() + 2], "big"))
    return False


def check_pixels(header: Header, max_pixels: int) -> None:
    """Raise BadImage (too_large) for more than `max_pixels`."""
    if header.width * header.height > max_pixels:
        raise BadImage("too_large", f"{header.width} x {header.height} is more than {max_pixels} pixels")


def is_reducible(data: bytes) -> bool:
    """Whether a photo's bytes can be decoded at less than its size: those of a JPEG."""
    return data[:2] == b"\xff\xd8"


def reduction(data: bytes, needed: Scale) -> int:
    """The largest reduction of a photo that leaves the pixels that its use needs: 2, 4 or 8 for a JPEG, else 1.

    Raises BadImage.
    """
    if not is_reducible(data):
        return 1
    header = read_header(data)
    size, scale = (header.width, header.height), needed(header.width, header.height)
    for factor in REDUCTIONS:
        # Pixels at the end that do not fill a reduced one are cut off, which must not shift the photo.
        cut_at_end = header.orientation in _FROM_TOP_LEFT or all(length % factor == 0 for length in size)
        if factor * scale <= 1 and factor <= min(size) and cut_at_end:
            return factor
    return 1


def decode_image(data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS, reduction: int = 1) -> np.ndarray:
    """Upright RGB pixels, uint8, shape (height // reduction, width // reduction, 3).

    Transparency is composited on white, 16-bit channels are scaled to 8 bits, CMYK and greyscale become RGB, and
    the EXIF orientation is applied. With a `reduction` (see the function), pixel (y, x) shows the pixels from
    (reduction * y, reduction * x) on. Raises BadImage; too_large is raised before any pixel is decoded.
    """
    header = read_header(data)
    check_pixels(header, max_pixels)
    if not is_complete(data, header):
        raise BadImage("truncated", f"the {header.format.upper()} ends before its end mark")
    if not header.plain:
        pixels = _decode_with_pillow(data, header, reduction)
    elif header.format == "png":
        pixels = _decode_plain_png(data, header)
    else:
        pixels = _decode_plain_jpeg(data, reduction)
    width, height = (
        (header.height, header.width) if header.orientation in _TRANSPOSED else (header.width, header.height)
    )
    if pixels.shape[:2] != (-(-height // reduction), -(-width // reduction)):
        raise BadImage(
            "corrupt", f"the pixels are {pixels.shape[1]} x {pixels.shape[0]}, the header says {width} x {height}"
        )
    return _upright(pixels[: height // reduction, : width // reduction], header.orientation)


def _decode_plain_png(data: bytes, header: Header) -> np.ndarray:
    try:
        from kornia_rs.io import decode_image_png_u8
    except ImportError:  # beside an exported model
        return _decode_with_pillow(data, header)

    try:
        return decode_image_png_u8(data, (header.height, header.width), "rgb")
    except Exception as error:  # the binding raises bare Exception for any decoding fault
        raise BadImage("corrupt", _one_line(error)) from None


def _decode_plain_jpeg(data: bytes, reduction: int) -> np.ndarray:
    import cv2

    flags = {
        1: 0,
        2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
        4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
        8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
    }
    colour = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags[reduction] | colour)
    except cv2.error as error:  # not for damage, but for memory and limits in the environment
        raise BadImage("corrupt", _one_line(error)) from None
    if image is None:
        raise BadImage("corrupt", "the JPEG cannot be decoded")
    return image


def _decode_with_pillow(data: bytes, header: Header, reduction: int = 1) -> np.ndarray:
    from PIL import Image

    image = _opened(data, header.format)
    with _pillow_faults():
        if reduction > 1:
            image.draft(None, (image.width // reduction, image.height // reduction))
        image.load()
    if image.mode.startswith("I;16") or (image.mode == "I" and header.format == "png"):
        wide = np.asarray(image).astype(np.uint32)
        return np.repeat((wide * 255 // 65535).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba)
    return np.array(image.convert("RGB"))


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Stored pixels turned and mirrored by their EXIF orientation."""
    import cv2

    if orientation in _TRANSPOSED:
        pixels = cv2.transpose(pixels)
    axes = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}  # of cv2.flip: 0 top to bottom, 1 left to right, -1 both
    return cv2.flip(pixels, axes[orientation]) if orientation in axes else pixels


def _opened(data: bytes, name: str) -> Any:
    """Pillow's lazy image of these bytes; the pixels are not decoded."""
    from PIL import Image, UnidentifiedImageError

    if name == "HEIF":
        try:
            from pillow_heif import register_heif_opener
        except ImportError:
            raise BadImage("not_an_image", "HEIC needs a package: pip install pillow-heif") from None
        register_heif_opener()
    formats = ("PNG", "JPEG") if name in ("png", "jpeg") else (name,)
    # ultralytics replaces Image.open by a function that installs packages when it meets an unknown file.
    pillow_open = getattr(sys.modules.get("ultralytics.utils.patches"), "_image_open", Image.open)
    try:
        with _pillow_faults():
            return pillow_open(io.BytesIO(data), formats=formats)
    except UnidentifiedImageError as error:
        reason = "corrupt" if name in ("png", "jpeg") else "not_an_image"
        raise BadImage(reason, _one_line(error)) from None


@contextmanager
def _pillow_faults() -> Iterator[None]:
    """What Pillow raises for bad bytes, as BadImage."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the pixel limit is checked against the header
            yield
    except UnidentifiedImageError:
        raise
    except Image.DecompressionBombError as error:
        raise BadImage("too_large", _one_line(error)) from None
    except (OSError, ValueError, SyntaxError, struct.error, MemoryError, EOFError, RuntimeError) as error:
        reason = "truncated" if "truncated" in str(error).lower() else "corrupt"
        raise BadImage(reason, _one_line(error)) from None


def _other_header(data: bytes, name: str) -> Header:
    try:
        image = _opened(data, name)
    except BadImage as error:
        # Pillow does not say whether the bytes are bad or too few.
        if name in ("GIF", "BMP") or error.reason == "too_large" or "pip install" in error.detail:
            raise
        raise BadImage("truncated", f"the {name} is cut off, damaged or of a rare kind") from None
    if image.mode in ("I", "F"):
        raise BadImage("corrupt", f"pixels of 32 bits have no known range (mode {image.mode})")
    # Pillow turns TIFF itself, and the HEIF plug-in its photos.
    orientation = int(image.getexif().get(_EXIF_ORIENTATION, 1)) if name in ("WEBP", "AVIF") else 1
    width, height = image.size
    if not width or not height:
        raise BadImage("not_an_image", f"the {name} header says {width} x {height}")
    if orientation in _TRANSPOSED:
        width, height = height, width
    return Header(name, width, height, plain=False, orientation=orientation)


def _png_header(data: bytes) -> Header:
    if len(data) < 29 or data[12:16] != b"IHDR":
        raise BadImage("truncated", "the PNG ends within its header")
    width, height, depth, colour = struct.unpack(">IIBB", data[16:26])
    if not width or not height:
        raise BadImage("corrupt", f"the PNG header says {width} x {height}")
    transparent, orientation = False, 1
    # Chunks after the pixels do not count: viewers lay a photo out before they read them.
    position = 33
    while (kind := data[position + 4 : position + 8]) not in (b"IDAT", b"IEND") and (kind.isalpha() or len(kind) < 4):
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        if len(data) < end:
            raise BadImage("truncated", "the PNG ends before its pixels")
        transparent = transparent or kind == b"tRNS"
        if kind == b"eXIf":
            orientation = _exif_orientation(data[position + 8 : end - 4])
        position = end
    if orientation in _TRANSPOSED:
        width, height = height, width
    plain = depth == 8 and colour == _PNG_RGB and not transparent and orientation == 1
    return Header("png", width, height, plain=plain, orientation=orientation)


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
            plain = depth == 8 and components == 3
            return Header("jpeg", width, height, plain=plain, orientation=orientation)
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
            orientation = int(struct.unpack(order + "H", field[8:10])[0])
            return orientation if 1 <= orientation <= 8 else 1
    return 1


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
