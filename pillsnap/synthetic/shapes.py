"""The body of a pill as height fields on a flat grid: outline, dome or bevel, rim, engraving, colours.

x is along the long axis of the pill, y along the short one, in px of a photo taken from above. Heights are in the same
px, from the plane at half the thickness.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pillsnap.synthetic.catalog import COLOURS, Look, Pill

_POLYGONS = {"삼각형": (3, 7.0), "오각형": (5, 12.0), "육각형": (6, 14.0), "팔각형": (8, 24.0)}
# Maximum size of the imprint as fractions of the long and the short side.
_TEXT_SHARES = {"삼각형": (0.44, 0.34), "마름모형": (0.44, 0.34)}
# Slope of the height field outside the outline: the real rim is vertical, but the tracer needs a slope.
WALL_SLOPE = 5.0
SHADOW_STEP = 4
_ENGRAVED_MM = 0.34
_CAPSULE_SEAM = 0.06  # position of the seam: fraction of the length from the middle


@dataclass(frozen=True)
class Body:
    """One side of a pill, on square float32 grids with the pill's centre in the middle pixel.

    `top` is the upper surface in px, `albedo` (h, w, 3) BGR in 0..255, `footprint` coverage at 1/SHADOW_STEP of the
    size, `underside` the BGR colour of a second layer, `half_thick` in px, `flatness` short side over long side.
    """

    top: np.ndarray
    albedo: np.ndarray
    footprint: np.ndarray
    underside: tuple[int, int, int] | None
    half_thick: float
    flatness: float
    gloss: float


def _inset(look: Look, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, float]:
    """Distance from the outline (positive inside) and its maximum, in mm."""
    a, b = look.long_mm / 2, look.short_mm / 2
    if look.shape == "원형":
        return a - np.hypot(x, y), a
    if look.shape in ("장방형", "캡슐"):
        return b - np.hypot(np.maximum(np.abs(x) - (a - b), 0), y), b
    if look.shape == "타원형":
        # First-order distance to an ellipse: value over gradient, both of which vanish in the middle.
        k0, k1 = np.hypot(x / a, y / b), np.hypot(x / a**2, y / b**2)
        return np.where(k0 < 0.02, b, np.minimum(k0 * (1 - k0) / np.maximum(k1, 1e-6), b)), b
    if look.shape in ("사각형", "마름모형"):
        power = 6.0 if look.shape == "사각형" else 1.5
        s = (np.abs(x / a) ** power + np.abs(y / b) ** power) ** (1 / power)
        depth = b if look.shape == "사각형" else b * 0.72
        return depth * (1 - s), depth
    sides, power = _POLYGONS[look.shape]
    inradius = a * math.cos(math.pi / sides) * 2 ** (1 / power)
    angles = [math.pi / 2 + 2 * math.pi * k / sides for k in range(sides)]
    reaches = sum(np.maximum(x * math.cos(angle) + y * math.sin(angle), 0) ** power for angle in angles)
    return inradius - reaches ** (1 / power), inradius


@lru_cache(maxsize=24)
def build_body(pill: Pill, direction: int, px_per_mm: float) -> Body:
    """The fields of the front (`direction` 0) or the back (1)."""
    look = pill.look
    radius = math.ceil((look.long_mm / 2 * 1.12 + 0.6) * px_per_mm)
    axis = np.arange(-radius, radius + 1, dtype=np.float32) / np.float32(px_per_mm)
    x, y = np.meshgrid(axis, axis)
    top_mm = _surface(look, x, y, px_per_mm)
    mark = _mark(pill, direction, px_per_mm, x.shape[0])
    albedo, underside = _colours(look, direction, x)
    grain = np.random.default_rng([int(pill.code.removeprefix("K-")), direction]).standard_normal(x.shape, np.float32)
    grain = cv2.GaussianBlur(grain, (0, 0), max(0.06 * px_per_mm, 0.5))
    albedo *= 1 + ((0.006 if look.glossy else 0.015) / grain.std()) * grain[..., None]
    if look.shape == "캡슐":  # gelatine is printed, not engraved
        ink = (52.0, 50.0, 54.0) if np.mean(COLOURS[look.colour]) > 105 else (232.0, 230.0, 226.0)
        albedo += (np.array(ink, np.float32) - albedo) * (0.85 * mark[..., None])
    else:
        top_mm -= _ENGRAVED_MM * cv2.GaussianBlur(mark, (0, 0), max(0.07 * px_per_mm, 0.45))
        albedo *= 1 - 0.16 * mark[..., None]
    return Body(
        top=np.asarray(top_mm * px_per_mm, np.float32),
        albedo=np.ascontiguousarray(albedo[..., ::-1]),
        footprint=_footprint(look, radius, px_per_mm),
        underside=None if underside is None else underside[::-1],
        half_thick=look.thick_mm / 2 * px_per_mm,
        flatness=look.short_mm / look.long_mm if look.shape in ("장방형", "캡슐", "타원형") else 1.0,
        gloss=0.55 if look.shape == "캡슐" else 0.22 if look.glossy else 0.05,
    )


def _surface(look: Look, x: np.ndarray, y: np.ndarray, px_per_mm: float) -> np.ndarray:
    """Height of the upper surface over the middle plane, mm: on a rim, a dome, a bevelled face or a half tube."""
    inset_mm, depth_mm = _inset(look, x, y)
    half_mm = look.thick_mm / 2
    if look.shape == "캡슐":
        rim_mm = 0.06 * half_mm
        rise = np.sqrt(1 - np.clip(1 - inset_mm / depth_mm, 0, 1) ** 2)
        rise[x < -_CAPSULE_SEAM * look.long_mm] *= 0.955  # the cap is pushed over the body
    else:
        rim_mm = half_mm * (0.5 if look.domed else 0.72)
        run_mm = depth_mm if look.domed else 0.22 * depth_mm
        rise = cv2.GaussianBlur(1 - (1 - np.clip(inset_mm / run_mm, 0, 1)) ** 2, (0, 0), max(0.12 * px_per_mm, 0.5))
    return rim_mm + (half_mm - rim_mm) * rise + np.minimum(inset_mm, 0) * WALL_SLOPE


def _footprint(look: Look, radius: int, px_per_mm: float) -> np.ndarray:
    """The outline as coverage, SHADOW_STEP times smaller."""
    step_mm = SHADOW_STEP / px_per_mm
    small = math.ceil(radius / SHADOW_STEP)
    axis = np.arange(-small, small + 1, dtype=np.float32) * np.float32(step_mm)
    inset_mm, _ = _inset(look, *np.meshgrid(axis, axis))
    return np.clip(0.5 + inset_mm / step_mm, 0, 1).astype(np.float32)


def _colours(look: Look, direction: int, x: np.ndarray) -> tuple[np.ndarray, tuple[int, int, int] | None]:
    """RGB of the upper surface, and of the layer below it where there are two."""
    first, second = COLOURS[look.colour], COLOURS.get(look.second_colour)
    albedo = np.empty((*x.shape, 3), np.float32)
    albedo[:] = first
    if second is None:
        return albedo, None
    if look.shape == "캡슐":
        albedo[x < -_CAPSULE_SEAM * look.long_mm] = second
        return albedo, None
    if direction == 1:
        albedo[:] = second
        return albedo, first
    return albedo, second


def _mark(pill: Pill, direction: int, px_per_mm: float, side: int) -> np.ndarray:
    """Imprint and score line as coverage in 0..1, drawn at twice the size and reduced."""
    look, px = pill.look, 2 * px_per_mm
    canvas = Image.new("L", (2 * side, 2 * side))
    draw = ImageDraw.Draw(canvas)
    share_x, share_y = _TEXT_SHARES.get(look.shape, (0.72, 0.52))
    wide, high = share_x * look.long_mm * px, share_y * look.short_mm * px
    stroke = max(1, round(0.16 * px))
    middle = float(side)
    # The centroid of a triangle is below the middle of its height.
    text_y = middle + (0.05 * look.long_mm * px if look.shape == "삼각형" else 0)
    if pill.scored[direction]:
        reach = 0.55 * look.short_mm * px
        draw.line([(middle, middle - reach), (middle, middle + reach)], fill=255, width=max(2, round(0.55 * px)))
        for i, part in enumerate(pill.prints[direction].split("|")):
            _draw_text(draw, part, (middle + (i - 0.5) * wide * 0.58, text_y), wide * 0.4, high, stroke)
    elif pill.prints[direction]:
        _draw_text(draw, pill.prints[direction], (middle, text_y), wide, high, stroke)
    return cv2.resize(np.asarray(canvas, np.float32) / 255, (side, side), interpolation=cv2.INTER_AREA)


def _draw_text(
    draw: ImageDraw.ImageDraw, text: str, centre: tuple[float, float], wide: float, high: float, stroke: int
) -> None:
    """Draw one line of text as large as fits into `wide` x `high` px around `centre`."""
    probe = 100
    left, top, right, bottom = draw.textbbox((0, 0), text, font=_font(probe))
    size = int(probe * min((wide - 2 * stroke) / (right - left), (high - 2 * stroke) / (bottom - top)))
    draw.text(centre, text, fill=255, font=_font(max(size, 6)), anchor="mm", stroke_width=stroke)


@lru_cache(maxsize=64)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    # Pillow's built-in font: images do not depend on installed fonts.
    return ImageFont.load_default(size)
