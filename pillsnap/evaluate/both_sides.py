"""Photos of the front and the back of one pill: which belong together, and their joint answers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np
import pyarrow as pa

from pillsnap.errors import UserError
from pillsnap.manifest.aihub import parse_name
from pillsnap.manifest.table import CAMERA_FIELDS
from pillsnap.metrics.both_sides import SidePairs

MAX_PAIRS = 2000
"""Pairs that an evaluation takes: it keeps all logits of their photos."""
_SIDES = {"front": 0, "f": 0, "앞": 0, "앞면": 0, "back": 1, "b": 1, "뒤": 1, "뒷면": 1}
_SIDE_AT_END = re.compile(rf"(.*?)[ _.-]*({'|'.join(sorted(_SIDES, key=len, reverse=True))})", re.IGNORECASE)


def pairs_of(names: Sequence[str], rule: str) -> list[tuple[int, int]]:
    """Indices of front and back of each pair of photos. `rule` is `order`, for photos that alternate, or `name`: AI
    Hub's file names, and others that end with the side, such as `12_front.jpg`. Raises UserError when there is no pair.
    """
    if rule == "order":
        if len(names) % 2:
            raise UserError(
                f"--pairs order needs an even number of photos, front and back in turn: {len(names)} given."
            )
        return [(index, index + 1) for index in range(0, len(names), 2)]
    assert rule == "name"
    found: dict[tuple[Any, ...], dict[int, list[int]]] = {}
    for index, name in enumerate(names):
        if (side := _side(name)) is not None:
            found.setdefault(side[0], {}).setdefault(side[1], []).append(index)
    pairs = [(both[0][0], both[1][0]) for both in found.values() if [len(both.get(i, ())) for i in (0, 1)] == [1, 1]]
    if not pairs:
        raise UserError(
            "--pairs name found no front and back of one pill: name them like 12_front.jpg and 12_back.jpg, or give "
            "them in turn with --pairs order."
        )
    return sorted(pairs)


def _side(name: str) -> tuple[tuple[Any, ...], int] | None:
    """What both photos of a pill have in common in their names, and the side: 0 front, 1 back."""
    path, parsed = PurePath(name), parse_name(name)
    if parsed is not None:
        rest = [getattr(parsed, field) for field in ("codes", *CAMERA_FIELDS) if field != "direction"]
        return ((str(path.parent), *map(str, rest)), parsed.direction) if parsed.direction in (0, 1) else None
    match = _SIDE_AT_END.fullmatch(path.stem)
    return None if match is None else ((str(path.parent), match[1].casefold()), _SIDES[match[2].casefold()])


def manifest_pairs(photos: pa.Table, codes: Iterable[str]) -> list[tuple[str, str]]:
    """Sample ids of front and back of the pairs of photos that each show one pill of `codes`.

    Each photo is in one pair at most: the n-th front of a code in the order of the other camera fields, and its n-th
    back. Of more than MAX_PAIRS, evenly spaced ones are taken.
    """
    known, sides = set(codes), {0: {}, 1: {}}  # type: ignore[var-annotated]
    names = ("sample_id", "codes", "boxes", "direction", *(field for field in CAMERA_FIELDS if field != "direction"))
    for sample_id, shown, boxes, direction, *camera in zip(*(photos[name].to_pylist() for name in names), strict=True):
        if len(shown) == 1 and shown[0] in known and boxes[0] is not None and direction in sides:
            key = [-1 if value is None else value for value in camera]
            sides[direction].setdefault(shown[0], []).append((key, sample_id))
    pairs = [
        (front[1], back[1])
        for code in sorted(sides[0])
        for front, back in zip(sorted(sides[0][code]), sorted(sides[1].get(code, ())), strict=False)
    ]
    return [pairs[i * len(pairs) // MAX_PAIRS] for i in range(MAX_PAIRS)] if len(pairs) > MAX_PAIRS else pairs


def side_pairs(rows: Iterable[Mapping[str, Any]], pairs: Sequence[tuple[str, str]]) -> SidePairs | None:
    """The pairs as arrays, from the rows of `infer`, which kept their logits; None when no pair could be read."""
    wanted = {name for pair in pairs for name in pair}
    found = {row["sample_id"]: row for row in rows if row["sample_id"] in wanted and row["label"]}
    read = [(found[front], found[back]) for front, back in pairs if front in found and back in found]
    if not read:
        return None
    front, back = (
        np.stack([calibrated(row["logits"][0], row["temperature"]) for row in part]) for part in zip(*read, strict=True)
    )
    return SidePairs(np.array([row["label"][0] for row, _ in read]), front, back)


def calibrated(logits: bytes, temperature: float) -> np.ndarray:
    """Calibrated logits (classes,) of a crop; 0 for all classes when one is not finite."""
    values = np.frombuffer(logits, np.float32).astype(np.float64) / temperature
    return values if np.isfinite(values).all() else np.zeros_like(values)
