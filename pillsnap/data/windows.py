"""Windows: photos, or the parts of them that a task needs, cut out and encoded once. No Ray, no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import cv2
import numpy as np

from pillsnap.data.augment import CropJitter
from pillsnap.photos.decode import BadImage, Scale, decode_image, reduction

Codec = Literal["jpeg", "jpeg2x", "png"]
"""`jpeg`: lossy (quality 95, 4:2:0), crops at the scale of use. `jpeg2x`: the same, at twice that scale or in the
photo's own pixels. `png`: crops in the photo's own pixels.
"""
JPEG_QUALITY = 95
_JPEG = (".jpg", [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
_ENCODE = {"jpeg": _JPEG, "jpeg2x": _JPEG, "png": (".png", [cv2.IMWRITE_PNG_COMPRESSION, 1])}
_DETAIL = {"jpeg": 1.0, "jpeg2x": 2.0, "png": float("inf")}
"""Pixels of a stored crop per pixel of the output, along each axis. With 1, crops lose detail when they are turned or
enlarged, and are blurrier than those of the evaluation, which come from the photo.
"""
# Windows start on a grid of 8, so that halving them three times averages the same pixels as halving the photo.
_GRID_PX = 8
_INTERPOLATION_PX = 2
_WHOLE_PHOTO = (0.0, 0.0, 1.0, 1.0)


def whole(width: int, height: int) -> float:
    """The scale of a use that needs all pixels of a photo."""
    return 1.0


@dataclass(frozen=True)
class Window:
    """Pixels of a photo or a part of it. Point p of the photo is at (p - (left, top)) * (scale_x, scale_y)."""

    pixels: np.ndarray
    """(height, width, 3) uint8 RGB."""
    left: float = 0.0
    top: float = 0.0
    scale_x: float = 1.0
    scale_y: float = 1.0

    def map_boxes(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes (..., 4) x, y, w, h from pixels of the photo to pixels of the window."""
        if (self.left, self.top, self.scale_x, self.scale_y) == _WHOLE_PHOTO:
            return np.asarray(boxes, np.float32)
        offset = np.array((self.left, self.top, 0.0, 0.0), np.float32)
        scale = np.array((self.scale_x, self.scale_y, self.scale_x, self.scale_y), np.float32)
        return (np.asarray(boxes, np.float32) - offset) * scale

    def encode(self, codec: Codec) -> EncodedWindow:
        """The window as bytes."""
        suffix, parameters = _ENCODE[codec]
        encoded, data = cv2.imencode(suffix, cv2.cvtColor(self.pixels, cv2.COLOR_RGB2BGR), parameters)
        assert encoded
        return EncodedWindow(data.tobytes(), self.left, self.top, self.scale_x, self.scale_y)


@dataclass(frozen=True)
class EncodedWindow:
    """A window as PNG or JPEG bytes, or a whole photo as the bytes of its file."""

    data: bytes | memoryview
    left: float = 0.0
    top: float = 0.0
    scale_x: float = 1.0
    scale_y: float = 1.0
    own: bool = True
    """Whether this package encoded it; then the header is not checked."""

    def decode(self, max_pixels: int, needed: Scale = whole) -> Window:
        """The window's pixels; a photo is decoded at the size that is `needed`. Raises BadImage."""
        if not self.own:
            return Photo(bytes(self.data), max_pixels).window(needed)
        pixels = cv2.imdecode(np.frombuffer(self.data, np.uint8), cv2.IMREAD_COLOR_RGB)
        if pixels is None:
            raise BadImage("corrupt", "a window of the store cannot be decoded")
        return Window(pixels, self.left, self.top, self.scale_x, self.scale_y)


@dataclass
class Photo:
    """The bytes of a photo, decoded once for each reduction that its uses need."""

    data: bytes
    max_pixels: int
    _windows: dict[int, Window] = field(default_factory=dict)

    def window(self, needed: Scale) -> Window:
        """The photo at the size that is `needed`. Raises BadImage."""
        factor = reduction(self.data, needed)
        if factor not in self._windows:
            pixels = decode_image(self.data, max_pixels=self.max_pixels, reduction=factor)
            self._windows[factor] = Window(pixels, scale_x=1 / factor, scale_y=1 / factor)
        return self._windows[factor]


def crop_scale(box: Sequence[float] | np.ndarray, size_px: int, margin: float, jitter: CropJitter) -> Scale:
    """What `augment.crop` needs of a photo under `jitter`."""
    return lambda width, height: size_px / (_side(box, margin) * math.exp(-jitter.scale))


def frame_scale(size_px: int, zoom: float = 1.0) -> Scale:
    """What a letterboxed frame, or a tile of a mosaic, needs of a photo when it is enlarged by at most `zoom`."""
    return lambda width, height: size_px / max(width, height) * zoom


def _side(box: Sequence[float] | np.ndarray, margin: float) -> float:
    """Side of the square around a box, as in `augment.crop`."""
    return max(float(box[2]), float(box[3]), 1.0) * (1 + 2 * margin)


def crop_window(
    photo: Window, box: np.ndarray, size_px: int, margin: float, jitter: CropJitter, codec: Codec
) -> Window:
    """The part of a photo that `augment.crop` can reach around one box under `jitter`.

    `png`: in the photo's pixels, so that crops equal those from the photo. `jpeg`, `jpeg2x`: reduced, never enlarged,
    to once or twice the scale at which a crop without jitter is `size_px` wide.
    """
    x, y, width, height = photo.map_boxes(box).tolist()
    side = _side((x, y, width, height), margin)
    angle = np.deg2rad(min(jitter.rotation_deg, 45.0))
    reach = side * np.exp(jitter.scale) * (0.5 * (np.cos(angle) + np.sin(angle)) + jitter.center) + _INTERPOLATION_PX
    middle = np.array((x + width / 2, y + height / 2))
    frame = np.array((photo.pixels.shape[1], photo.pixels.shape[0]))
    low = np.clip(np.floor((middle - reach) / _GRID_PX) * _GRID_PX, 0, frame - 1).astype(int)
    high = np.clip(np.ceil((middle + reach) / _GRID_PX) * _GRID_PX, low + 1, frame).astype(int)
    pixels = photo.pixels[low[1] : high[1], low[0] : high[0]]
    left, top = low / (photo.scale_x, photo.scale_y)
    scale = _DETAIL[codec] * size_px / side
    if scale >= 1.0:
        return Window(pixels, float(left), float(top), photo.scale_x, photo.scale_y)
    size = np.maximum(np.round((high - low) * scale), 1).astype(int)
    reduced = cv2.resize(pixels, (int(size[0]), int(size[1])), interpolation=cv2.INTER_AREA)
    scale_x, scale_y = size / (high - low) * (photo.scale_x, photo.scale_y)
    return Window(reduced, float(left), float(top), float(scale_x), float(scale_y))


def frame_window(photo: Window, size_px: int) -> Window:
    """A photo, halved while its longer side stays at least `size_px`."""
    pixels, scale = photo.pixels, photo.scale_x
    while max(pixels.shape[:2]) >= 2 * size_px and min(pixels.shape[:2]) >= 2:
        height, width = pixels.shape[0] // 2, pixels.shape[1] // 2
        pixels = cv2.resize(pixels[: 2 * height, : 2 * width], (width, height), interpolation=cv2.INTER_AREA)
        scale /= 2
    return Window(pixels, scale_x=scale, scale_y=scale)
