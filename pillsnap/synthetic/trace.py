"""One pill as seen by the camera: intersects view rays with the height field, lights the surface, casts shadows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np

from pillsnap.synthetic.shapes import SHADOW_STEP, WALL_SLOPE, Body

# Directions towards the lamps: x to the right, y towards the camera's side of the table, z up.
_KEY_LAMP, _KEY_STRENGTH = (-0.52, -0.42, 0.74), 0.48
_FILL_LAMP, _FILL_STRENGTH = (0.62, 0.30, 0.72), 0.16
_SHADOW_MM = 5.0  # maximum distance of the shadow from the pill
_STEEPEST = 6.0  # steeper slopes are lit as this one
_TABLE_SIZE = 241


@dataclass(frozen=True)
class Sprite:
    """A rendered pill, to be composited on the paper.

    `colour` (h, w, 3) float32 BGR times coverage, `alpha` (h, w) coverage in 0..1, `mask` (h, w) uint8 0/1, and
    `shadow` (h', w') the fraction of light lost by the paper. Origins: top left corners in the frame.
    """

    origin: tuple[int, int]
    colour: np.ndarray
    alpha: np.ndarray
    mask: np.ndarray
    shadow_origin: tuple[int, int]
    shadow: np.ndarray


def trace(body: Body, centre: tuple[float, float], turn_deg: float, latitude_deg: int, px_per_mm: float) -> Sprite:
    """Render `body` at `centre` (px in the frame), rotated by `turn_deg`, from a camera at `latitude_deg`."""
    sin_la, cos_la = math.sin(math.radians(latitude_deg)), math.cos(math.radians(latitude_deg))
    c, s = math.cos(math.radians(turn_deg)), math.sin(math.radians(turn_deg))
    turn = np.array([[c, -s], [s * sin_la, c * sin_la]])
    # The camera aims at the centre of the pill; its underside appears lower in the frame.
    drop = body.half_thick * cos_la
    radius = body.top.shape[0] // 2
    half_w = math.ceil(radius * min(1.0, abs(c) + abs(s) * body.flatness)) + 2
    half_h = math.ceil(radius * sin_la * min(1.0, abs(s) + abs(c) * body.flatness) + drop) + 2
    x0, y0 = math.floor(centre[0]) - half_w, math.floor(centre[1]) - half_h
    size = (2 * half_w + 1, 2 * half_h + 1)
    ground = _affine(turn, radius, (centre[0] - x0, centre[1] - y0 + drop))
    floor = float(body.top.min())
    top = cv2.warpAffine(body.top, ground, size, borderMode=cv2.BORDER_CONSTANT, borderValue=floor)
    level, reach = _first_hits(top, body.half_thick, cos_la, floor)

    ground_x = np.tile(np.arange(size[0], dtype=np.float32), (size[1], 1))
    ground_y = level * np.float32(cos_la)
    ground_y += np.arange(size[1], dtype=np.float32)[:, None]
    slopes = cv2.merge(
        [cv2.Sobel(top, cv2.CV_32F, 1, 0, scale=1 / 8), cv2.Sobel(top, cv2.CV_32F, 0, 1, scale=sin_la / 8)]
    )
    slopes = cv2.remap(slopes, ground_x, ground_y, cv2.INTER_LINEAR)
    back = cv2.invertAffineTransform(ground).astype(np.float32)
    body_x = back[0, 0] * ground_x + back[0, 1] * ground_y + back[0, 2]
    body_y = back[1, 0] * ground_x + back[1, 1] * ground_y + back[1, 2]
    colour = cv2.remap(body.albedo, body_x, body_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    if body.underside is not None:
        colour[level < 0.85 * body.half_thick] = body.underside
    # Outside the outline `top` falls by WALL_SLOPE a px, so this is the share of the pixel that the pill covers.
    alpha = np.clip(0.5 + reach / np.float32(WALL_SLOPE), 0, 1)
    light, shine = _shade(slopes, level, body, latitude_deg)
    cv2.multiply(colour, cv2.merge([light * alpha] * 3), dst=colour)
    cv2.add(colour, cv2.merge([shine * alpha] * 3), dst=colour)
    shadow_origin, shadow = _shadow(body, turn, (centre[0], centre[1] + drop), sin_la, px_per_mm)
    return Sprite((x0, y0), colour, alpha, (reach > 0).astype(np.uint8), shadow_origin, shadow)


def _affine(turn: np.ndarray, radius: float, centre: tuple[float, float]) -> np.ndarray:
    """The matrix that maps the middle of a grid (pixel `radius`, `radius`) to `centre`."""
    return np.column_stack([turn, np.asarray(centre) - turn @ (radius, radius)])


def _first_hits(top: np.ndarray, half_thick: float, cos_la: float, floor: float) -> tuple[np.ndarray, np.ndarray]:
    """Height above the paper at which each view ray hits the pill, and its maximum depth below the surface.

    Steps upwards by whole px of parallax, so that each step shifts the array by rows. The highest level inside the pill
    is the hit, since the camera looks down; between levels it is interpolated. A ray whose depth is negative
    misses the pill; its level is that of the rim.
    """
    if cos_la < 1e-6:
        return np.maximum(top, 0) + np.float32(half_thick), top
    rise = 2 * half_thick * cos_la
    rows = max(1, round(rise / 20))
    steps = math.ceil(rise / rows)
    height, width = top.shape
    padded = cv2.copyMakeBorder(top, 0, rows * (steps + 1), 0, 0, cv2.BORDER_CONSTANT, value=floor)

    def off_middle(k: np.ndarray | int) -> np.ndarray:
        return np.abs(np.float32(rows / cos_la) * k - np.float32(half_thick))

    last = np.zeros(top.shape, np.float32)
    reach = np.full_like(top, -np.inf)
    depth, inside = np.empty_like(top), np.empty(top.shape, bool)
    for k in range(steps + 1):
        np.subtract(padded[k * rows : k * rows + height], off_middle(k), out=depth)
        np.greater(depth, 0, out=inside)
        np.copyto(last, np.float32(k), where=inside)
        np.maximum(reach, depth, out=reach)
    column = np.arange(width, dtype=np.int64) + np.arange(height, dtype=np.int64)[:, None] * width
    cell = column + last.astype(np.int64) * (rows * width)
    flat = padded.ravel()
    here = np.maximum(flat[cell] - off_middle(last), 0)
    above = flat[cell + rows * width] - off_middle(last + np.float32(1))
    crossing = here / np.maximum(here - above, np.float32(1e-3))
    level = (last + np.minimum(crossing, 1)) * np.float32(rows / cos_la)
    return np.where(reach > 0, level, np.float32(half_thick)), reach


def _shade(slopes: np.ndarray, level: np.ndarray, body: Body, latitude_deg: int) -> tuple[np.ndarray, np.ndarray]:
    """Factor of the surface colour, and white specular light, of each pixel."""
    zoom = (_TABLE_SIZE - 1) / 2 / _STEEPEST
    np.clip(slopes, -_STEEPEST, _STEEPEST, out=slopes)
    u, v = cv2.split(slopes * np.float32(zoom) + np.float32((_TABLE_SIZE - 1) / 2))
    # The lower half of the table is for surfaces that face down.
    v += _TABLE_SIZE * (level < body.half_thick)
    light, shine = cv2.split(cv2.remap(_light_table(latitude_deg), u, v, cv2.INTER_LINEAR))
    # The lower half of the rim is darker, towards the paper.
    light *= np.float32(0.7) + np.float32(0.3) * np.minimum(level / np.float32(body.half_thick), 1)
    shine *= np.float32(255 * body.gloss)
    return light, shine


@lru_cache(maxsize=8)
def _light_table(latitude_deg: int) -> np.ndarray:
    """(2 * size, size, 2) float32: Lambert light and Blinn shine over the surface's slopes along y and x.

    The upper half is for surfaces that face up, the lower one for those that face down.
    """
    view = (0.0, math.cos(math.radians(latitude_deg)), math.sin(math.radians(latitude_deg)))
    axis = np.linspace(-_STEEPEST, _STEEPEST, _TABLE_SIZE)
    slope_x, slope_y = np.meshgrid(axis, axis)
    halves = []
    for up in (1.0, -1.0):
        normal = np.stack([-slope_x, -slope_y, np.full_like(slope_x, up)], axis=-1)
        normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
        light = 0.36 + 0.20 * normal[..., 2]
        for lamp, strength in ((_KEY_LAMP, _KEY_STRENGTH), (_FILL_LAMP, _FILL_STRENGTH)):
            light += strength * np.maximum(normal @ _unit(lamp), 0)
        half_way = _unit(_unit(_KEY_LAMP) + np.array(view))
        halves.append(np.stack([light, np.maximum(normal @ half_way, 0) ** 28], axis=-1))
    return np.concatenate(halves).astype(np.float32)


def _unit(vector: tuple[float, ...] | np.ndarray) -> np.ndarray:
    return np.asarray(vector) / np.linalg.norm(vector)


def _shadow(
    body: Body, turn: np.ndarray, centre: tuple[float, float], sin_la: float, px_per_mm: float
) -> tuple[tuple[int, int], np.ndarray]:
    """Contact shadow, ambient shadow and soft shadow of the key lamp, computed at 1/SHADOW_STEP of the size."""
    step = SHADOW_STEP
    unit = px_per_mm / step
    radius = body.footprint.shape[0] // 2
    half = radius + math.ceil(_SHADOW_MM * unit)
    x0, y0 = (math.floor(value / step) - half for value in centre)
    side = (2 * half + 1, 2 * half + 1)
    # Pixel centres: big = step * small + (step - 1) / 2.
    middle = [(value - (step - 1) / 2) / step - origin for value, origin in zip(centre, (x0, y0), strict=True)]
    small = cv2.warpAffine(body.footprint, _affine(turn, radius, (middle[0], middle[1])), side)
    reach = 0.9 * body.half_thick / step / _KEY_LAMP[2]
    move = np.array([[1, 0, -_KEY_LAMP[0] * reach], [0, 1, -_KEY_LAMP[1] * reach * sin_la]])
    cast = cv2.warpAffine(cv2.GaussianBlur(small, (0, 0), 0.7 * unit), move, side)
    contact = cv2.GaussianBlur(small, (0, 0), 0.35 * unit + 0.2)
    ambient = cv2.GaussianBlur(small, (0, 0), 1.5 * unit)
    total = 0.22 * contact + 0.16 * ambient + 0.26 * cast
    shadow = cv2.resize(total, None, fx=step, fy=step, interpolation=cv2.INTER_LINEAR)
    return (x0 * step, y0 * step), shadow
