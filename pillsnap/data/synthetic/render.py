"""Renders one photograph: paper, shadows, pills seen from the camera's latitude, light colour, blur, sensor noise."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np

from pillsnap.data.synthetic.catalog import Pill
from pillsnap.data.synthetic.shapes import Body, build_body

MM_ACROSS = 48.8  # what the shorter side of the frame shows: a 10 mm tablet covers 200 of 976 px
_SHADOW_MM = 5.0
_NOISE_MARGIN_PX = 64
# RGB gains of 전구색 (incandescent), 주광색 (daylight), 주백색 (neutral white).
_LIGHT_GAINS = {0: (1.05, 0.985, 0.86), 1: (0.955, 1.0, 1.045), 2: (1.01, 1.0, 0.965)}
_KEY_LIGHT = (-0.52, -0.42, 0.74)
_FILL_LIGHT = (0.62, 0.30, 0.72)


@dataclass(frozen=True)
class Placement:
    """A pill on the paper: centre in px of the frame seen from above, turn in degrees."""

    pill: Pill
    centre: tuple[float, float]
    turn_deg: float


@dataclass(frozen=True)
class Photo:
    """`pixels` BGR uint8 (h, w, 3); one (x, y, w, h) box in px and one bool mask (frame-sized) a pill."""

    pixels: np.ndarray
    boxes: list[tuple[int, int, int, int]]
    masks: list[np.ndarray]


@dataclass(frozen=True)
class _Traced:
    """A pill on its patch: `colour` (h, w, 3) premultiplied RGB, `alpha` and `mask` (h, w), `shadow` in 0..1."""

    origin: tuple[int, int]
    colour: np.ndarray
    alpha: np.ndarray
    mask: np.ndarray
    shadow: np.ndarray


def photo_rng(seed: int, stem: str) -> np.random.Generator:
    """The random numbers of one photograph: they depend on seed and file name alone."""
    return np.random.default_rng([seed, 3, zlib.crc32(stem.encode())])


def render_photo(
    placements: list[Placement], *, direction: int, light: int, latitude: int, frame: tuple[int, int], seed: int, stem: str
) -> Photo:
    """Draw the photo of `frame` (w, h) px. `direction`, `light` and `latitude` mean what they mean in the file name."""
    rng = photo_rng(seed, stem)
    px_per_mm = min(frame) / MM_ACROSS
    sharpness_px = float(rng.uniform(0.55, 0.85)) * min(frame) / 976
    paper = _paper(rng, frame, seed)
    traced = [
        _trace(build_body(p.pill, direction, px_per_mm), p, latitude, frame, px_per_mm, sharpness_px) for p in placements
    ]
    for pill in traced:
        view, local = _overlap(paper, pill.origin, pill.shadow.shape)
        view *= 1 - pill.shadow[local][..., None]
    boxes, masks = [], []
    for pill in traced:
        view, local = _overlap(paper, pill.origin, pill.mask.shape)
        view *= 1 - pill.alpha[local][..., None]
        view += pill.colour[local]
        boxes.append(_box(pill))
        masks.append(_frame_mask(pill, frame))
    gains = np.float32(_LIGHT_GAINS[light]) * float(rng.uniform(0.95, 1.03)) * rng.normal(1, 0.008, 3).astype(np.float32)
    paper *= gains[::1]
    dx, dy = (int(v) for v in rng.integers(_NOISE_MARGIN_PX, size=2))
    noise = _noise(seed, frame)[dy : dy + frame[1], dx : dx + frame[0]]
    pixels = cv2.add(paper[..., ::-1], noise, dtype=cv2.CV_8U)
    return Photo(pixels, boxes, masks)


def _trace(
    body: Body, place: Placement, latitude: int, frame: tuple[int, int], px_per_mm: float, blur_px: float
) -> _Traced:
    """Follow the view rays of an orthographic camera onto the height field, shade what they hit, cast the shadow."""
    sin_la, cos_la = math.sin(math.radians(latitude)), math.cos(math.radians(latitude))
    rise = int(math.ceil(2 * body.half_thick * cos_la))
    pad = int(math.ceil(_SHADOW_MM * px_per_mm))
    radius = body.top.shape[0] // 2 + pad
    height, width = 2 * radius + 1, 2 * radius + 1
    # Whole-pixel origin; the fraction goes into the warp.
    ground_y = frame[1] / 2 + (place.centre[1] - frame[1] / 2) * sin_la + body.half_thick * cos_la
    x0, y0 = math.floor(place.centre[0]) - radius, math.floor(ground_y) - radius
    turn = math.radians(place.turn_deg)
    c, s = math.cos(turn), math.sin(turn)
    forward = np.float64(
        [[c, -s, place.centre[0] - x0], [s * sin_la, c * sin_la, ground_y - y0]]
    )
    middle = body.top.shape[0] // 2
    forward[:, 2] -= forward[:, :2] @ (middle, middle)
    warp = {"M": forward, "dsize": (width, height), "flags": cv2.INTER_LINEAR}
    floor = float(-3 * body.half_thick)
    top = cv2.warpAffine(body.top, **warp, borderMode=cv2.BORDER_CONSTANT, borderValue=floor)
    footprint = cv2.warpAffine(body.footprint, **warp)
    level, hit = _first_hits(top, body.half_thick, rise, cos_la)

    rows = np.arange(height, dtype=np.float32)[:, None]
    map_y = rows + level * cos_la
    map_x = np.broadcast_to(np.arange(width, dtype=np.float32)[None], map_y.shape)
    slope_x = cv2.Sobel(top, cv2.CV_32F, 1, 0, ksize=3, scale=1 / 8)
    slope_y = cv2.Sobel(top, cv2.CV_32F, 0, 1, ksize=3, scale=sin_la / 8)
    slopes = cv2.remap(cv2.merge([slope_x, slope_y]), map_x.copy(), map_y, cv2.INTER_LINEAR)
    albedo = cv2.warpAffine(body.albedo, **warp, borderMode=cv2.BORDER_REPLICATE)
    albedo = cv2.remap(albedo, map_x.copy(), map_y, cv2.INTER_LINEAR)
    if body.underside is not None:
        albedo[level < 0.85 * body.half_thick] = body.underside
    colour = _shade(albedo, slopes, level, body, (0.0, cos_la, sin_la))
    mask = hit.astype(np.float32)
    colour *= mask[..., None]
    alpha = cv2.GaussianBlur(mask, (0, 0), blur_px)
    colour = cv2.GaussianBlur(colour, (0, 0), blur_px)
    return _Traced((x0, y0), colour, alpha, hit, _shadow(footprint, body.half_thick, sin_la, px_per_mm))


def _first_hits(top: np.ndarray, half_thick: float, rise: int, cos_la: float) -> tuple[np.ndarray, np.ndarray]:
    """The height above the paper at which each view ray meets the pill, and whether it does.

    Walks up the pill in steps of one px of parallax, so that a step is a shift of the array by one row; the last level
    still inside wins because the camera looks down. Between levels the crossing is interpolated.
    """
    height, width = top.shape
    if rise == 0 or cos_la < 1e-6:
        return top + half_thick, top > 0
    step = 1 / cos_la
    padded = cv2.copyMakeBorder(top, 0, rise + 1, 0, 0, cv2.BORDER_CONSTANT, value=float(top.min()))
    level = np.zeros_like(top)
    hit = np.zeros(top.shape, bool)
    inside = padded[0:height] - half_thick
    for k in range(rise + 1):
        above = padded[k + 1 : k + 1 + height] - abs((k + 1) * step - half_thick)
        found = inside > 0
        gap = np.maximum(inside - above, 1e-3)
        np.copyto(level, step * (k + np.clip(inside / gap, 0, 1)), where=found)
        hit |= found
        inside = above
    return level, hit


def _shade(albedo: np.ndarray, slopes: np.ndarray, level: np.ndarray, body: Body, view) -> np.ndarray:
    below = level < body.half_thick
    nx, ny = -slopes[..., 0], -slopes[..., 1]
    nz = np.where(below, np.float32(-1), np.float32(1))
    norm = 1 / np.sqrt(nx * nx + ny * ny + 1)
    nx, ny, nz = nx * norm, ny * norm, nz * norm
    light = 0.36 + 0.20 * nz
    for direction, strength in ((_KEY_LIGHT, 0.48), (_FILL_LIGHT, 0.16)):
        lx, ly, lz = np.float32(direction) / np.linalg.norm(direction)
        light += strength * np.maximum(nx * lx + ny * ly + nz * lz, 0)
    # The paper's own shadow creeps up the lower half of the rim.
    light *= 0.72 + 0.28 * np.clip(level / body.half_thick, 0, 1)
    hx, hy, hz = np.float32(_KEY_LIGHT) / np.linalg.norm(_KEY_LIGHT) + np.float32(view)
    length = math.sqrt(hx * hx + hy * hy + hz * hz)
    shine = np.maximum((nx * hx + ny * hy + nz * hz) / length, 0) ** 28
    return albedo * light[..., None] + (255 * body.gloss) * shine[..., None]


def _shadow(footprint: np.ndarray, half_thick: float, sin_la: float, px_per_mm: float) -> np.ndarray:
    """Contact shadow, shade under the rim, and the soft shadow of the key light; worked out at a quarter of the size."""
    height, width = footprint.shape
    small = cv2.resize(footprint, (width // 4 + 1, height // 4 + 1), interpolation=cv2.INTER_AREA)
    unit = px_per_mm / 4
    contact = cv2.GaussianBlur(small, (0, 0), 0.35 * unit + 0.3)
    ambient = cv2.GaussianBlur(small, (0, 0), 1.5 * unit)
    reach = 0.9 * half_thick / 4
    move = np.float64([[1, 0, -_KEY_LIGHT[0] * reach / _KEY_LIGHT[2]], [0, 1, -_KEY_LIGHT[1] * reach / _KEY_LIGHT[2] * sin_la]])
    cast = cv2.warpAffine(cv2.GaussianBlur(small, (0, 0), 0.7 * unit), move, (small.shape[1], small.shape[0]))
    total = 0.22 * contact + 0.16 * ambient + 0.26 * cast
    return cv2.resize(total, (width, height), interpolation=cv2.INTER_LINEAR)


def _overlap(image: np.ndarray, origin: tuple[int, int], shape: tuple[int, ...]):
    """The part of the frame that a patch covers, and the part of the patch that lies on the frame."""
    x0, y0 = origin
    top, left = max(y0, 0), max(x0, 0)
    bottom, right = min(y0 + shape[0], image.shape[0]), min(x0 + shape[1], image.shape[1])
    return image[top:bottom, left:right], (slice(top - y0, bottom - y0), slice(left - x0, right - x0))


def _box(pill: _Traced) -> tuple[int, int, int, int]:
    x, y, w, h = cv2.boundingRect(pill.mask.astype(np.uint8))
    return x + pill.origin[0], y + pill.origin[1], w, h


def _frame_mask(pill: _Traced, frame: tuple[int, int]) -> np.ndarray:
    mask = np.zeros((frame[1], frame[0]), bool)
    view, local = _overlap(mask, pill.origin, pill.mask.shape)
    view |= pill.mask[local]
    return mask


def _paper(rng: np.random.Generator, frame: tuple[int, int], seed: int) -> np.ndarray:
    """Light grey paper, unevenly lit; float32 RGB (h, w, 3)."""
    tilt = rng.uniform(-9, 9, 2)
    y, x = np.mgrid[-1:1:9j, -1:1:7j].astype(np.float32)
    coarse = rng.uniform(196, 208) + tilt[0] * x + tilt[1] * y - 10 * (x * x + y * y) + rng.normal(0, 1.2, x.shape)
    rgb = coarse.astype(np.float32)[..., None] * np.float32((1.0, 1.0, 1.004))
    paper = cv2.resize(rgb, frame, interpolation=cv2.INTER_CUBIC)
    dx, dy = (int(v) for v in rng.integers(_NOISE_MARGIN_PX, size=2))
    texture = _texture(seed, frame)[dy : dy + frame[1], dx : dx + frame[0]]
    return cv2.add(paper, texture)


@lru_cache(maxsize=2)
def _texture(seed: int, frame: tuple[int, int]) -> np.ndarray:
    """Paper fibres: a grey relief, drawn once and seen through a shifted window in every photo."""
    rng = np.random.default_rng([seed, 4])
    shape = (frame[1] + _NOISE_MARGIN_PX, frame[0] + _NOISE_MARGIN_PX)
    grain = rng.standard_normal(shape, dtype=np.float32)
    scale = min(frame) / 976
    fine = cv2.GaussianBlur(grain, (0, 0), 1.1 * scale + 0.2)
    coarse = cv2.GaussianBlur(grain, (0, 0), 5.0 * scale + 0.2)
    relief = 1.0 * fine / fine.std() + 0.8 * coarse / coarse.std()
    return cv2.merge([relief, relief, relief])


@lru_cache(maxsize=2)
def _noise(seed: int, frame: tuple[int, int]) -> np.ndarray:
    """Sensor noise, slightly correlated as a demosaiced picture's is; its strength decides the weight of the PNG."""
    rng = np.random.default_rng([seed, 5])
    shape = (frame[1] + _NOISE_MARGIN_PX, frame[0] + _NOISE_MARGIN_PX, 3)
    noise = cv2.GaussianBlur(rng.standard_normal(shape, dtype=np.float32), (0, 0), 0.5)
    return noise * np.float32(1.3 / noise.std())
