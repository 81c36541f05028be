"""List of photographs with their names and folders, and positions of their pills; a function of the arguments."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pillsnap.errors import UserError
from pillsnap.synthetic.catalog import Pill
from pillsnap.synthetic.render import MM_ACROSS, Placement, photo_rng

DIRECTIONS = {0: "앞면", 1: "뒷면"}
LIGHTS = {0: "전구색", 1: "주광색", 2: "주백색"}
LATITUDES = (60, 70, 75, 90)
LONGITUDES = tuple(range(0, 360, 10))
COMBINATION_LATITUDES = (70, 75, 90)
VIEWS_PER_CLASS = len(DIRECTIONS) * len(LIGHTS) * len(LATITUDES) * len(LONGITUDES)
_SINGLE_FOLDERS, _COMBINATION_FOLDERS = 4, 2
_STATE, _BACKGROUND, SIZE = 0, 2, 200


@dataclass(frozen=True)
class PhotoPlan:
    """One photograph to make. `image_dir` and `label_dirs` (one per pill, same order) are relative to the root."""

    stem: str
    pills: tuple[Pill, ...]
    direction: int
    light: int
    latitude: int
    longitude: int
    image_dir: str
    label_dirs: tuple[str, ...]


def plan_photos(catalog: list[Pill], num_singles: int, num_combinations: int, seed: int) -> list[PhotoPlan]:
    """Every photo of the tree in a fixed order.

    Raises:
        UserError: there are fewer different views or sets of pills than photos.
    """
    return [*_plan_singles(catalog, num_singles, seed), *_plan_combinations(catalog, num_combinations, seed)]


def _plan_singles(catalog: list[Pill], num_singles: int, seed: int) -> Iterator[PhotoPlan]:
    most = len(catalog) * VIEWS_PER_CLASS
    if not 0 <= num_singles <= most:
        raise UserError(f"num_singles is {num_singles}: {len(catalog)} classes have 0 to {most} single views")
    share, extra = divmod(num_singles, len(catalog))
    folders = min(_SINGLE_FOLDERS, len(catalog))
    for index, pill in enumerate(catalog):
        folder = 1 + index * folders // len(catalog)
        for direction, light, latitude, longitude in _views(pill, seed, share + (index < extra)):
            yield PhotoPlan(
                stem=f"{pill.code}_{_view_name(direction, light, latitude, longitude)}",
                pills=(pill,),
                direction=direction,
                light=light,
                latitude=latitude,
                longitude=longitude,
                image_dir=f"train/images/single/TS_{folder}_single/{pill.code}",
                label_dirs=(f"train/labels/single/TL_{folder}_single/{pill.code}_json",),
            )


def _views(pill: Pill, seed: int, count: int) -> Iterator[tuple[int, int, int, int]]:
    """Different views of one pill: sides, lights and latitudes equally often, longitudes at random."""
    rng = photo_rng(seed, pill.code)
    cells = list(itertools.product(DIRECTIONS, LIGHTS, LATITUDES))
    order = rng.permutation(len(cells))
    longitudes = [rng.permutation(LONGITUDES) for _ in cells]
    for i in range(count):
        cell = int(order[i % len(cells)])
        yield *cells[cell], int(longitudes[cell][i // len(cells)])


def _plan_combinations(catalog: list[Pill], num_combinations: int, seed: int) -> Iterator[PhotoPlan]:
    sets = math.ceil(num_combinations / len(COMBINATION_LATITUDES))
    most = sum(math.comb(len(catalog), size) for size in (2, 3, 4))
    if num_combinations < 0 or sets > most:
        raise UserError(
            f"num_combinations is {num_combinations}: {len(catalog)} classes can be combined in "
            f"0 to {most * len(COMBINATION_LATITUDES)} photos"
        )
    folders = min(_COMBINATION_FOLDERS, max(sets, 1))
    for index, pills in enumerate(itertools.islice(_combinations(catalog, seed), sets)):
        name = "-".join([pills[0].code, *(pill.code.removeprefix("K-") for pill in pills[1:])])
        folder = 1 + index * folders // sets
        left = num_combinations - index * len(COMBINATION_LATITUDES)
        for latitude in COMBINATION_LATITUDES[:left]:
            labels = f"train/labels/combination/TL_{folder}_combo/{name}_json"
            yield PhotoPlan(
                stem=f"{name}_{_view_name(0, 2, latitude, 0)}",
                pills=pills,
                direction=0,
                light=2,
                latitude=latitude,
                longitude=0,
                image_dir=f"train/images/combination/TS_{folder}_combo/{name}",
                label_dirs=tuple(f"{labels}/{pill.code}" for pill in pills),
            )


def _combinations(catalog: list[Pill], seed: int) -> Iterator[tuple[Pill, ...]]:
    """All different sets of 2 to 4 pills; every pill occurs about equally often."""
    rng = np.random.default_rng([seed, 6])
    seen: set[tuple[int, ...]] = set()
    uses = np.zeros(len(catalog))
    while True:
        size = int(rng.integers(2, min(4, len(catalog)) + 1))
        # Pills with the fewest uses, plus noise so that sets differ.
        picks = tuple(sorted(int(i) for i in np.argsort(uses + rng.uniform(0, 3, len(catalog)), kind="stable")[:size]))
        if picks in seen:
            picks = tuple(sorted(int(i) for i in rng.choice(len(catalog), size, replace=False)))
        if picks not in seen:
            seen.add(picks)
            uses[list(picks)] += 1
            yield tuple(catalog[i] for i in picks)


def _view_name(direction: int, light: int, latitude: int, longitude: int) -> str:
    return f"{_STATE}_{_BACKGROUND}_{direction}_{light}_{latitude}_{longitude:03d}_{SIZE}"


def place_pills(plan: PhotoPlan, frame: tuple[int, int], seed: int) -> list[Placement]:
    """Positions of the pills on the paper.

    The photos of a combination share one arrangement; only the camera moves. Each pill is in its own quarter of the
    frame, which is larger than any pill, so that pills neither overlap nor leave the frame.
    """
    width, height = frame
    px_per_mm = min(frame) / MM_ACROSS
    if len(plan.pills) == 1:
        rng = photo_rng(seed, plan.stem + "/place")
        reach = 0.08 * min(frame)
        centre = (width / 2 + float(rng.uniform(-reach, reach)), height / 2 + float(rng.uniform(-reach, reach)))
        return [Placement(plan.pills[0], centre, plan.longitude + float(rng.uniform(-3, 3)))]
    rng = photo_rng(seed, plan.image_dir)
    quarters = rng.permutation([(x, y) for y in (0.25, 0.75) for x in (0.25, 0.75)])
    placements = []
    for pill, (x, y) in zip(plan.pills, quarters, strict=False):
        # The projection of a pill moves up by at most its thickness; a low latitude shortens the quarters.
        radius = (pill.look.long_mm / 2 * 1.05 + 1.2) * px_per_mm
        slack = [max(0.0, side / 4 * share - radius) for side, share in ((width, 1.0), (height, 0.9))]
        dx, dy = (float(rng.uniform(-s, s)) for s in slack)
        placements.append(Placement(pill, (x * width + dx, y * height + dy), float(rng.uniform(0, 360))))
    return placements
