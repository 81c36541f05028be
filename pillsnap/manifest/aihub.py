"""AI Hub file names: the fields of a name, and the label paths of a photo.

    [data/]train/images/single/TS_5_single/K-000114/K-000114_0_2_0_0_75_260_200.png
    [data/]train/labels/single/TL_5_single/K-000114_json/K-000114_0_2_0_0_75_260_200.json
    [data/]train/images/combination/TS_1_combo/K-A-B/K-A-B_0_2_0_2_70_000_200.png
    [data/]train/labels/combination/TL_1_combo/K-A-B_json/K-A/K-A-B_0_2_0_2_70_000_200.json

In the ZIP archives the layout starts below TS_* and TL_*.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

CODES = re.compile(r"K(?:-[0-9]+)+")
_VIEW = re.compile(r"_(\d+)_(\d+)_(\d+)_(\d+)_(\d+)_(\d+)_(\d+)")
EXTENSIONS = (".png", ".jpg", ".jpeg")
_INT16_MAX = 32767


@dataclass(frozen=True)
class PhotoName:
    """Fields of an AI Hub file name: the K-codes of all pills in the photo, camera and light."""

    codes: tuple[str, ...]
    state: int
    background: int
    direction: int
    light: int
    latitude: int
    longitude: int
    size: int


def parse_name(name: str) -> PhotoName | None:
    """Parse a file name, with or without folders and extension; None for any other name."""
    stem, dot, extension = name.rpartition("/")[2].partition(".")
    if (dot + extension).lower() not in ("", *EXTENSIONS):
        return None
    prefix, _, rest = stem.partition("_")
    fields = view_fields("_" + rest)
    if fields is None or not CODES.fullmatch(prefix):
        return None
    return PhotoName(split_codes(prefix), *fields)


def split_codes(prefix: str) -> tuple[str, ...]:
    """`K-001900-010224` -> (`K-001900`, `K-010224`)."""
    return tuple("K-" + digits for digits in prefix.split("-")[1:])


def label_paths(folder: str, prefix: str, stem: str) -> list[str]:
    """Label JSON paths of one photo, in the order of its codes, relative to the data root."""
    base = label_folder(folder)
    return [f"{base}/{name}" for name in label_names(prefix, stem)]


def label_names(prefix: str, stem: str) -> list[str]:
    """Label JSON names of one photo, relative to its label folder, in the order of its codes."""
    codes = split_codes(prefix)
    return [f"{stem}.json"] if len(codes) == 1 else [f"{code}/{stem}.json" for code in codes]


@lru_cache(maxsize=4096)
def label_folder(folder: str) -> str:
    """`…/images/single/TS_5_single/K-000114` -> `…/labels/single/TL_5_single/K-000114_json`."""
    head, part, leaf = folder.rsplit("/", 2)
    return f"{_sibling(head, 'images', 'labels')}/{label_part(part)}/{leaf}_json"


def label_part(part: str) -> str:
    """`TS_5_single` -> `TL_5_single` (`VS_` -> `VL_` in the official validation set)."""
    return re.sub(r"^([TV])S", r"\1L", part)


def _sibling(path: str, old: str, new: str) -> str:
    parts = path.split("/")
    position = len(parts) - 1 - parts[::-1].index(old)
    return "/".join([*parts[:position], new, *parts[position + 1 :]])


def view_fields(view: str) -> tuple[int, ...] | None:
    match = _VIEW.fullmatch(view)
    if match is None:
        return None
    fields = tuple(map(int, match.groups()))
    return fields if max(fields) <= _INT16_MAX else None
