"""Renders one photograph: paper, shadows, pills, the colour of the light, blur, sensor noise."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np

from pillsnap.synthetic.catalog import Pill
from pillsnap.synthetic.shapes import build_body
from pillsnap.synthetic.trace import Sprite, trace

MM_ACROSS = 48.8
"""Length of the frame's shorter side: a 10 mm tablet covers 200 of 976 px."""
_POOL_MARGIN_PX = 64
# BGR gains of 전구색 (incandescent), 주광색 (daylight), 주백색 (neutral white), after the camera's white balance.
_LIGHT_GAINS = {0: (0.90, 0.99, 1.04), 1: (1.04, 1.0, 0.965), 2: (0.975, 1.0, 1.01)}


@dataclass(frozen=True)
class Placement:
    """A pill on the paper: centre in px of the frame seen from above, rotation in degrees."""

    pill: Pill
    centre: tuple[float, float]
    turn_deg: float


@dataclass(frozen=True)
class Photo:
    """`pixels` BGR uint8 (h, w, 3); one (x, y, w, h) box in px around the visible part of each pill."""

    pixels: np.ndarray
    boxes: list[tuple[int, int, int, int]]


def photo_rng(seed: int, name: str) -> np.random.Generator:
    """Random number generator of one photograph; depends only on seed and name."""
    return np.random.default_rng([seed, 3, zlib.crc32(name.encode())])


def render_photo(
    placements: list[Placement],
    *,
    direction: int,
    light: int,
    latitude: int,
    frame: tuple[int, int],
    seed: int,
    stem: str,
) -> Photo:
    """Draw a photo of `frame` (w, h) px; `direction`, `light` and `latitude` (degrees) as in the file name."""
    rng = photo_rng(seed, stem)
    px_per_mm = min(frame) / MM_ACROSS
    blur_px = 0.35 + float(rng.uniform(0.25, 0.5)) * min(frame) / 976
    exposure = float(rng.uniform(0.96, 1.03))
    gains = (exposure * np.array(_LIGHT_GAINS[light]) * rng.normal(1, 0.006, 3)).astype(np.float32)
    squeeze = np.sin(np.radians(latitude))
    sprites = []
    for place in placements:
        centre = (place.centre[0], frame[1] / 2 + (place.centre[1] - frame[1] / 2) * squeeze)
        sprites.append(trace(build_body(place.pill, direction, px_per_mm), centre, place.turn_deg, latitude, px_per_mm))

    paper = _paper(rng, frame, seed, gains)
    for sprite in sprites:
        view, local = _overlap(paper, sprite.shadow_origin, sprite.shadow.shape)
        _scale(view, 1 - sprite.shadow[local])
    for sprite in sprites:
        alpha = cv2.GaussianBlur(sprite.alpha, (0, 0), blur_px)
        colour = cv2.GaussianBlur(sprite.colour, (0, 0), blur_px)
        view, local = _overlap(paper, sprite.origin, alpha.shape)
        _scale(view, 1 - alpha[local])
        view += colour[local] * gains
    noise = _window(_noise(seed, frame), rng, frame)
    strength = float(rng.uniform(0.6, 1.4))
    pixels = cv2.addWeighted(paper, 1, noise, strength, 0, dtype=cv2.CV_8U)
    return Photo(pixels, [_box(sprite) for sprite in sprites])


def _scale(view: np.ndarray, factor: np.ndarray) -> None:
    view[:] = cv2.multiply(view, cv2.merge([factor] * 3))


def _overlap(
    image: np.ndarray, origin: tuple[int, int], shape: tuple[int, ...]
) -> tuple[np.ndarray, tuple[slice, slice]]:
    """The part of the frame that a patch covers, and the part of the patch inside the frame."""
    x0, y0 = origin
    top, left = max(y0, 0), max(x0, 0)
    bottom, right = min(y0 + shape[0], image.shape[0]), min(x0 + shape[1], image.shape[1])
    return image[top:bottom, left:right], (slice(top - y0, bottom - y0), slice(left - x0, right - x0))


def _box(sprite: Sprite) -> tuple[int, int, int, int]:
    x, y, w, h = cv2.boundingRect(sprite.mask)
    return x + sprite.origin[0], y + sprite.origin[1], w, h


def _paper(rng: np.random.Generator, frame: tuple[int, int], seed: int, gains: np.ndarray) -> np.ndarray:
    """Light grey paper, unevenly lit; float32 BGR (h, w, 3)."""
    tilt = rng.uniform(-8, 8, 2)
    y, x = np.mgrid[-1:1:9j, -1:1:7j].astype(np.float32)
    grey = rng.uniform(202, 212) + tilt[0] * x + tilt[1] * y - 9 * (x * x + y * y) + rng.normal(0, 0.5, x.shape)
    smooth = cv2.resize(grey.astype(np.float32), (frame[0] // 8, frame[1] // 8), interpolation=cv2.INTER_CUBIC)
    paper = cv2.resize(smooth[..., None] * gains, frame, interpolation=cv2.INTER_LINEAR)
    return cv2.add(paper, _window(_texture(seed, frame), rng, frame), dst=paper)


def _window(pool: np.ndarray, rng: np.random.Generator, frame: tuple[int, int]) -> np.ndarray:
    dx, dy = (int(v) for v in rng.integers(_POOL_MARGIN_PX, size=2))
    return pool[dy : dy + frame[1], dx : dx + frame[0]]


@lru_cache(maxsize=2)
def _texture(seed: int, frame: tuple[int, int]) -> np.ndarray:
    """Paper fibres: a grey relief, generated once; each photo uses a shifted window of it."""
    rng = np.random.default_rng([seed, 4])
    grain = rng.standard_normal((frame[1] + _POOL_MARGIN_PX, frame[0] + _POOL_MARGIN_PX), dtype=np.float32)
    scale = min(frame) / 976
    fine = cv2.GaussianBlur(grain, (0, 0), 1.1 * scale + 0.2)
    coarse = cv2.GaussianBlur(grain, (0, 0), 5.0 * scale + 0.2)
    return cv2.merge([1.0 * fine / fine.std() + 0.8 * coarse / coarse.std()] * 3)


@lru_cache(maxsize=2)
def _noise(seed: int, frame: tuple[int, int]) -> np.ndarray:
    """Sensor noise, slightly correlated as after demosaicing; its strength determines the size of the PNG."""
    rng = np.random.default_rng([seed, 5])
    shape = (frame[1] + _POOL_MARGIN_PX, frame[0] + _POOL_MARGIN_PX, 3)
    noise = cv2.GaussianBlur(rng.standard_normal(shape, dtype=np.float32), (0, 0), 0.5)
    return noise * np.float32(1.3 / noise.std())
