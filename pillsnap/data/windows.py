"""Windows: photos, or the parts of them that a task needs, cut out and encoded once. No Ray, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np

from pillsnap.data.augment import CropJitter
from pillsnap.photos.decode import BadImage, decode_image

Codec = Literal["jpeg", "png"]
"""`jpeg`: lossy (quality 95, 4:2:0), at the scale of the task. `png`: crops in the photo's own pixels."""
JPEG_QUALITY = 95
_ENCODE = {
    "jpeg": (".jpg", [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]),
    "png": (".png", [cv2.IMWRITE_PNG_COMPRESSION, 1]),
}
# Windows start on a grid of 8, so that halving them three times averages the same pixels as halving the photo.
_GRID_PX = 8
_INTERPOLATION_PX = 2
_WHOLE_PHOTO = (0.0, 0.0, 1.0, 1.0)


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

    def decode(self, max_pixels: int) -> Window:
        """The window's pixels. Raises BadImage."""
        if self.own:
            pixels = cv2.imdecode(np.frombuffer(self.data, np.uint8), cv2.IMREAD_COLOR_RGB)
            if pixels is None:
                raise BadImage("corrupt", "a window of the store cannot be decoded")
        else:
            pixels = decode_image(bytes(self.data), max_pixels=max_pixels)
        return Window(pixels, self.left, self.top, self.scale_x, self.scale_y)


def crop_window(
    photo: np.ndarray, box: np.ndarray, size_px: int, margin: float, jitter: CropJitter, codec: Codec
) -> Window:
    """The part of a photo that `augment.crop` can reach around one box under `jitter`.

    `png`: in the photo's pixels, so that crops equal those from the photo. `jpeg`: reduced, never enlarged, to the
    scale at which a crop without jitter is `size_px` wide.
    """
    x, y, width, height = (float(value) for value in box)
    side = max(width, height, 1.0) * (1 + 2 * margin)
    angle = np.deg2rad(min(jitter.rotation_deg, 45.0))
    reach = side * np.exp(jitter.scale) * (0.5 * (np.cos(angle) + np.sin(angle)) + jitter.center) + _INTERPOLATION_PX
    middle = np.array((x + width / 2, y + height / 2))
    frame = np.array((photo.shape[1], photo.shape[0]))
    low = np.clip(np.floor((middle - reach) / _GRID_PX) * _GRID_PX, 0, frame - 1).astype(int)
    high = np.clip(np.ceil((middle + reach) / _GRID_PX) * _GRID_PX, low + 1, frame).astype(int)
    pixels = photo[low[1] : high[1], low[0] : high[0]]
    scale = size_px / side
    if codec == "png" or scale >= 1.0:
        return Window(pixels, float(low[0]), float(low[1]))
    size = np.maximum(np.round((high - low) * scale), 1).astype(int)
    reduced = cv2.resize(pixels, (int(size[0]), int(size[1])), interpolation=cv2.INTER_AREA)
    scale_x, scale_y = size / (high - low)
    return Window(reduced, float(low[0]), float(low[1]), float(scale_x), float(scale_y))


def frame_window(photo: np.ndarray, size_px: int) -> Window:
    """A photo, halved while its longer side stays at least `size_px`."""
    scale = 1.0
    while max(photo.shape[:2]) >= 2 * size_px and min(photo.shape[:2]) >= 2:
        height, width = photo.shape[0] // 2, photo.shape[1] // 2
        photo = cv2.resize(photo[: 2 * height, : 2 * width], (width, height), interpolation=cv2.INTER_AREA)
        scale /= 2
    return Window(photo, scale_x=scale, scale_y=scale)
