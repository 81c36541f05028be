"""Pure geometry and colour: (image, boxes, rng) -> (image, boxes). Each image is warped once, from its original.

Boxes are (n, 4) float32 arrays of x, y, w, h in pixels. Images are (height, width, 3) uint8 RGB.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import cast

import cv2
import numpy as np
from numpy.random.bit_generator import ISeedSequence

PADDING_GREY = 114
_MIN_BOX_PX = 2.0
_MIN_VISIBLE = 0.1
_MAX_ASPECT = 100.0
_ERASED_AREA = (0.02, 0.2)
_ERASED_LOG_ASPECT = 1.2
_STEPS = np.arange(256, dtype=np.float64)[:, None]


@dataclass(frozen=True)
class FrameJitter:
    """Ranges of detection augmentation; fractions unless the name has a unit."""

    mosaic: float = 0.0
    scale: float = 0.0
    translate: float = 0.0
    rotation_deg: float = 0.0
    flip_horizontal: float = 0.0
    flip_vertical: float = 0.0
    hue: float = 0.0
    saturation: float = 0.0
    brightness: float = 0.0


@dataclass(frozen=True)
class CropJitter:
    """Ranges of classification augmentation; fractions of the crop's side unless the name has a unit.

    There are no flips: a mirrored imprint is another pill.
    """

    center: float = 0.0
    scale: float = 0.0
    rotation_deg: float = 0.0
    hue: float = 0.0
    saturation: float = 0.0
    brightness: float = 0.0
    erase: float = field(default=0.0, repr=False)
    """Fraction of crops with an erased rectangle. Not in `repr`, which names the store: stored windows do not depend
    on it.
    """


def sample_rng(seed: int, number: int, sample_id: str) -> np.random.Generator:
    """Random number generator of a sample's pass `number`; independent of process, worker and earlier draws."""
    digest = hashlib.blake2b(f"{seed}/{number}/{sample_id}".encode(), digest_size=16).digest()
    seed_sequence = cast("np.random.SeedSequence", _Key(np.frombuffer(digest, "<u8")))
    return np.random.Generator(np.random.Philox(seed_sequence))


class _Key(ISeedSequence):
    """Philox's key as a seed sequence. With the argument `key`, NumPy also reads unused entropy from the kernel."""

    def __init__(self, words: np.ndarray) -> None:
        self._words = words

    def generate_state(self, n_words: int, dtype: object = np.uint32) -> np.ndarray:
        return self._words


def crop(
    image: np.ndarray,
    box: np.ndarray,
    size_px: int,
    margin: float,
    jitter: CropJitter,
    rng: np.random.Generator,
    target: np.ndarray | None = None,
) -> np.ndarray:
    """A jittered square around one box, (size_px, size_px, 3), in one warp; written to `target` if given.

    The square's side is the box's longer side, plus the fraction `margin` of it on each side; `jitter` moves, scales
    and rotates it.
    """
    x, y, width, height = box.tolist()
    grow, right, down, turn = (2 * draw - 1 for draw in rng.random(4).tolist())
    side = max(width, height, 1.0) * (1 + 2 * margin) * math.exp(grow * jitter.scale)
    center_x = x + width / 2 + side * right * jitter.center
    center_y = y + height / 2 + side * down * jitter.center
    angle = math.radians(turn * jitter.rotation_deg)
    scale = size_px / side
    cosine, sine = scale * math.cos(angle), scale * math.sin(angle)
    # Maps the jittered box centre to the centre of the crop, in coordinates of pixel centres.
    half, left, top = (size_px - 1) / 2, center_x - 0.5, center_y - 0.5
    matrix = np.array(
        (
            (cosine, -sine, half - cosine * left + sine * top),
            (sine, cosine, half - sine * left - cosine * top),
            (0.0, 0.0, 1.0),
        )
    )
    patch = warp(image, matrix, size_px, border=cv2.BORDER_REPLICATE, target=target)
    patch = _colour(patch, jitter.hue, jitter.saturation, jitter.brightness, rng)
    if jitter.erase and rng.random() < jitter.erase:
        erase(patch, rng)
    return patch


def erase(image: np.ndarray, rng: np.random.Generator) -> None:
    """Fill a rectangle of 2 to 20 % of a square image with one colour, in place.

    Zhong et al., "Random Erasing Data Augmentation", 2020.
    """
    size_px = len(image)
    side = size_px * np.sqrt(rng.uniform(*_ERASED_AREA))
    aspect = np.exp(rng.uniform(-_ERASED_LOG_ASPECT, _ERASED_LOG_ASPECT) / 2)
    height, width = (max(1, min(size_px, round(length))) for length in (side * aspect, side / aspect))
    top, left = (int(rng.integers(size_px - length + 1)) for length in (height, width))
    image[top : top + height, left : left + width] = rng.integers(0, 256, 3)


def letterbox_matrix(width: int, height: int, size_px: int) -> np.ndarray:
    """3 x 3 matrix from a frame's pixels to a centred square of `size_px`, aspect ratio kept."""
    scale = size_px / max(width, height)
    left, top = (size_px - width * scale) / 2, (size_px - height * scale) / 2
    return _translation(left, top) @ _scaling(scale, scale)


def letterbox(image: np.ndarray, size_px: int) -> np.ndarray:
    """The whole frame in a grey square of `size_px`."""
    height, width = image.shape[:2]
    return warp(image, _pixel_centres(letterbox_matrix(width, height, size_px)), size_px, border=cv2.BORDER_CONSTANT)


def transform_boxes(boxes: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Axis-aligned boxes around the mapped corners; not clipped."""
    if not len(boxes):
        return np.zeros((0, 4), np.float32)
    x, y, width, height = boxes.astype(np.float64).T
    corners = np.stack([np.stack([x, x + width, x, x + width]), np.stack([y, y, y + height, y + height])])
    mapped = np.einsum("ij,jcn->icn", matrix[:2, :2], corners) + matrix[:2, 2][:, None, None]
    low, high = mapped.min(axis=1), mapped.max(axis=1)
    return np.concatenate([low, high - low]).T.astype(np.float32)


def frame_sample(
    images: list[np.ndarray],
    boxes: list[np.ndarray],
    size_px: int,
    jitter: FrameJitter,
    rng: np.random.Generator,
    maps: list[np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """One training frame (size_px, size_px, 3) from one photo, or a mosaic of four, with its boxes (n, 4).

    A mosaic puts four letterboxed photos corner to corner on a canvas of twice the size and cuts a jittered window from
    its middle, as ultralytics does. Each tile is warped from its original directly into the window. Each photo's 3 x 3
    matrix into the frame is appended to `maps`, if given.
    """
    canvas_px = 2 * size_px if len(images) == 4 else size_px
    window = _window_matrix(canvas_px, size_px, jitter, rng)
    meeting_x, meeting_y = rng.uniform(size_px / 2, 1.5 * size_px, size=2)
    frame = np.full((size_px, size_px, 3), PADDING_GREY, np.uint8)
    placed = []
    for tile, (image, tile_boxes) in enumerate(zip(images, boxes, strict=True)):
        height, width = image.shape[:2]
        if len(images) == 4:
            scale = size_px / max(width, height)
            left = meeting_x - width * scale if tile % 2 == 0 else meeting_x
            top = meeting_y - height * scale if tile < 2 else meeting_y
            tile_matrix = _translation(left, top) @ _scaling(scale, scale)
        else:
            tile_matrix = letterbox_matrix(width, height, size_px)
        matrix = window @ tile_matrix
        warp(image, _pixel_centres(matrix), size_px, border=cv2.BORDER_TRANSPARENT, target=frame)
        placed.append(_visible(tile_boxes, matrix, size_px))
        if maps is not None:
            maps.append(matrix)
    frame = _colour(frame, jitter.hue, jitter.saturation, jitter.brightness, rng)
    return frame, np.concatenate(placed)


def area_in_frame(width: int, height: int, matrix: np.ndarray, size_px: int) -> np.ndarray:
    """The part of a square frame, (4,) x y w h, that a photo of `width` x `height` covers under a 3 x 3 matrix."""
    x, y, w, h = transform_boxes(np.array([[0, 0, width, height]]), matrix)[0]
    low, high = np.clip([x, y], 0, size_px), np.clip([x + w, y + h], 0, size_px)
    return np.concatenate([low, high - low]).astype(np.float32)


def warp(
    image: np.ndarray, matrix: np.ndarray, size_px: int, *, border: int, target: np.ndarray | None = None
) -> np.ndarray:
    """`image` warped by a 3 x 3 pixel matrix into a square of `size_px`.

    It is first halved by area averaging while the scale is at most 0.5, which keeps small imprints legible.
    """
    (a, b, _), (c, d, _), _ = matrix.tolist()
    scale = math.sqrt(abs(a * d - b * c))
    while scale <= 0.5 and min(image.shape[:2]) >= 2:
        height, width = image.shape[0] // 2, image.shape[1] // 2
        image = cv2.resize(image[: 2 * height, : 2 * width], (width, height), interpolation=cv2.INTER_AREA)
        matrix = matrix @ _translation(-0.5, -0.5) @ _scaling(2, 2) @ _translation(0.5, 0.5)
        scale *= 2
    return cv2.warpAffine(
        image,
        matrix[:2],
        (size_px, size_px),
        dst=target,
        flags=cv2.INTER_LINEAR,
        borderMode=border,
        borderValue=(PADDING_GREY,) * 3,
    )


def _window_matrix(canvas_px: int, size_px: int, jitter: FrameJitter, rng: np.random.Generator) -> np.ndarray:
    scale = rng.uniform(1 - jitter.scale, 1 + jitter.scale)
    angle = np.deg2rad(rng.uniform(-jitter.rotation_deg, jitter.rotation_deg))
    shift = rng.uniform(0.5 - jitter.translate, 0.5 + jitter.translate, size=2) * size_px
    flip_x = -1.0 if rng.random() < jitter.flip_horizontal else 1.0
    flip_y = -1.0 if rng.random() < jitter.flip_vertical else 1.0
    middle = canvas_px / 2
    return (
        _translation(*shift)
        @ _scaling(scale * flip_x, scale * flip_y)
        @ _rotation(angle)
        @ _translation(-middle, -middle)
    )


def _visible(boxes: np.ndarray, matrix: np.ndarray, size_px: int) -> np.ndarray:
    mapped = transform_boxes(boxes, matrix)
    low = np.clip(mapped[:, :2], 0, size_px)
    high = np.clip(mapped[:, :2] + mapped[:, 2:], 0, size_px)
    size = high - low
    area, whole = size.prod(axis=1), np.maximum(mapped[:, 2:].prod(axis=1), 1e-9)
    aspect = np.maximum(size[:, 0] / np.maximum(size[:, 1], 1e-9), size[:, 1] / np.maximum(size[:, 0], 1e-9))
    keep = (size.min(axis=1, initial=np.inf) > _MIN_BOX_PX) & (area / whole > _MIN_VISIBLE) & (aspect < _MAX_ASPECT)
    return np.concatenate([low, size], axis=1)[keep].astype(np.float32)


def _colour(
    image: np.ndarray, hue: float, saturation: float, brightness: float, rng: np.random.Generator
) -> np.ndarray:
    # Modifies the image. The draws are made even when unused, so that later draws do not depend on the settings.
    draws = rng.random(3)
    if not (hue or saturation or brightness):
        return image
    gains = (2 * draws - 1) * (hue, saturation, brightness) + 1
    tables = _STEPS * gains
    tables[:, 0] %= 180
    np.clip(tables, 0, 255, out=tables)
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    cv2.LUT(hsv, tables.astype(np.uint8)[None], dst=hsv)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB, dst=image)


def _pixel_centres(matrix: np.ndarray) -> np.ndarray:
    # Boxes are in continuous coordinates (pixel centres at +0.5), cv2 warps pixel indices.
    return _translation(-0.5, -0.5) @ matrix @ _translation(0.5, 0.5)


def _translation(x: float, y: float) -> np.ndarray:
    return np.array([[1, 0, x], [0, 1, y], [0, 0, 1]], np.float64)


def _scaling(x: float, y: float) -> np.ndarray:
    return np.array([[x, 0, 0], [0, y, 0], [0, 0, 1]], np.float64)


def _rotation(angle: float) -> np.ndarray:
    cosine, sine = np.cos(angle), np.sin(angle)
    return np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]], np.float64)
