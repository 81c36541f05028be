"""AI Hub photos in other folders than the official tree: as delivered, unpacked anywhere, or all in one folder.

    01.데이터/1.Training/원천데이터/TS_1_단일/K-000114/….png
    01.데이터/1.Training/라벨링데이터/TL_1_단일/K-000114_json/….json
    train_images/K-001900-010224_….png
    train_annotations/K-001900-010224_json/K-001900/….json

Photos are known by their names and their folder's K-code, labels by their folder `<codes>_json`.
"""

from __future__ import annotations

import os
import re
import unicodedata
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from pillsnap.manifest.aihub import CODES, EXTENSIONS, label_names, label_part, parse_name, split_codes

_OFFICIAL = re.compile(r"(data/)?(train|val)/(images|labels)")
_MAX_DEPTH = 6
_VALIDATION = re.compile(r"(\d\.)?validation|val(_.*)?|vs_.*|test(_.*)?", re.IGNORECASE)


@dataclass
class Delivery:
    """What a walk found outside the official tree. Paths are relative to the data root."""

    root: str
    leaves: list[tuple[str, str]] = field(default_factory=list)
    """(folder above, name) of folders named by K-codes."""
    flat: list[str] = field(default_factory=list)
    """Folders that hold photos of many codes."""
    strays: list[str] = field(default_factory=list)
    """Images in folders without any AI Hub photo."""
    labels: dict[str, list[str]] = field(default_factory=dict)
    """Folders above a label folder, by the name of the label folder."""

    def label_jobs(self, folder: str, prefix: str, stem: str) -> list[str]:
        """Label path per code of a photo, in the order of its codes. Where several folders fit, the part's own
        (TS_1 -> TL_1) comes first, then one in which the file exists.
        """
        name = f"{prefix}_json"
        above = self.labels.get(name) or [os.path.dirname(folder)]
        paths = []
        for label in label_names(prefix, stem):
            ways = [f"{base}/{name}/{label}" if base else f"{name}/{label}" for base in _own_first(folder, above)]
            paths.append(next((way for way in ways if os.path.exists(f"{self.root}/{way}")), ways[0]))
        assert len(paths) == len(split_codes(prefix))
        return paths


def tree_of(folder: str) -> str:
    """`val` if a folder of the path is named for validation or test, else `train`."""
    return "val" if any(_VALIDATION.fullmatch(part) for part in folder.split("/")) else "train"


def find_delivery(root: Path) -> Delivery:
    """Walk the folders of `root` that are not of the official tree; folders named by K-codes are not opened."""
    found = Delivery(os.fspath(root))
    seen: set[tuple[int, int]] = set()
    stack = [("", 0)]
    while stack:
        folder, depth = stack.pop()
        info = os.stat(root / folder)
        if (info.st_dev, info.st_ino) in seen or _OFFICIAL.fullmatch(folder):
            continue
        seen.add((info.st_dev, info.st_ino))
        images = []
        with os.scandir(root / folder) as entries:
            for entry in entries:
                path = f"{folder}/{entry.name}" if folder else entry.name
                if entry.name.lower().endswith(EXTENSIONS):
                    images.append(entry.name)
                elif CODES.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                    found.leaves.append((folder, entry.name))
                elif entry.name.endswith("_json") and CODES.fullmatch(entry.name[:-5]):
                    found.labels.setdefault(entry.name, []).append(folder)
                elif depth < _MAX_DEPTH and entry.is_dir():
                    stack.append((path, depth + 1))
        if any(parse_name(name) for name in images):
            found.flat.append(folder)
        else:
            found.strays += [f"{folder}/{name}" if folder else name for name in images]
    for folders in (found.leaves, found.flat, found.strays, *found.labels.values()):
        folders.sort()  # type: ignore[attr-defined]
    return found


@lru_cache(maxsize=65_536)
def _own_first_cached(folder: str, above: tuple[str, ...]) -> tuple[str, ...]:
    wanted = {_form(label_part(part)) for part in folder.split("/")}
    return tuple(sorted(above, key=lambda base: -len(wanted & {_form(part) for part in base.split("/")})))


def _own_first(folder: str, above: list[str]) -> tuple[str, ...]:
    return _own_first_cached(folder, tuple(above)) if len(above) > 1 else tuple(above)


def _form(name: str) -> str:
    return unicodedata.normalize("NFC", name).lower()
