"""The AI Hub folder layout: where photos and labels lie, what a file name says, and a scan of the tree.

    [data/]train/images/single/TS_5_single/K-000114/K-000114_0_2_0_0_75_260_200.png
    [data/]train/labels/single/TL_5_single/K-000114_json/K-000114_0_2_0_0_75_260_200.json
    [data/]train/images/combination/TS_1_combo/K-A-B/K-A-B_0_2_0_2_70_000_200.png
    [data/]train/labels/combination/TL_1_combo/K-A-B_json/K-A/K-A-B_0_2_0_2_70_000_200.json

The depth is fixed, so a link loop cannot trap the scan. Directory links are followed down to the TS_* level (people
keep parts of the set on other disks); links and anything but regular files below it are refused and counted.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pillsnap.errors import UserError

Progress = Callable[[str, int, int], None]
"""Called as progress(phase, done, total); total is 0 while unknown."""

_CODES = re.compile(r"K(?:-[0-9]+)+")
_VIEW = re.compile(r"_(\d+)_(\d+)_(\d+)_(\d+)_(\d+)_(\d+)_(\d+)")
_EXTENSIONS = (".png", ".jpg", ".jpeg")
_INT16_MAX = 32767


@dataclass(frozen=True)
class PhotoName:
    """What an AI Hub file name says: the K-codes of all pills in the photo, and camera and light."""

    codes: tuple[str, ...]
    state: int
    background: int
    direction: int
    light: int
    latitude: int
    longitude: int
    size: int


@dataclass
class Refused:
    """Entries of the tree that are no photo, counted by reason, the first few of each named."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, path: str, limit: int = 20) -> None:
        """Count one entry."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < limit:
            examples.append(path)

    def merge(self, other: Refused) -> None:
        """Add the counts and examples of another scan."""
        for reason, count in other.counts.items():
            self.counts[reason] = self.counts.get(reason, 0) + count
            self.examples[reason] = sorted(self.examples.get(reason, []) + other.examples[reason])[:20]


@dataclass
class Scan:
    """All photos of a tree, eight bytes each: photo i is `sets[set_index[i]]` seen as `views[view_index[i]]`.

    A set is one (folder, codes) pair; a view is the rest of the file name. `view_fields` is int16, shape (views, 7), in
    the order of manifest.CAMERA_FIELDS. Photos are sorted by folder, then by name.
    """

    folders: list[str]
    prefixes: list[str]
    views: list[str]
    view_fields: np.ndarray
    set_index: np.ndarray
    view_index: np.ndarray
    refused: Refused

    def __len__(self) -> int:
        return len(self.set_index)

    def stem(self, photo: int) -> str:
        """File name without extension."""
        return self.prefixes[self.set_index[photo]] + self.views[self.view_index[photo]].rpartition(".")[0]

    def path(self, photo: int) -> str:
        """POSIX path relative to the data root."""
        index = self.set_index[photo]
        return f"{self.folders[index]}/{self.prefixes[index]}{self.views[self.view_index[photo]]}"


def parse_name(name: str) -> PhotoName | None:
    """Parse a file name, with or without folders and extension; None when it is no AI Hub photo name."""
    stem, dot, extension = name.rpartition("/")[2].partition(".")
    if (dot + extension).lower() not in ("", *_EXTENSIONS):
        return None
    prefix, _, rest = stem.partition("_")
    fields = _view_fields("_" + rest)
    if fields is None or not _CODES.fullmatch(prefix):
        return None
    return PhotoName(split_codes(prefix), *fields)


def split_codes(prefix: str) -> tuple[str, ...]:
    """`K-001900-010224` -> (`K-001900`, `K-010224`)."""
    return tuple("K-" + digits for digits in prefix.split("-")[1:])


def label_paths(folder: str, prefix: str, stem: str) -> list[str]:
    """Label JSON paths of one photo, in the order of its codes, relative to the data root."""
    base = label_folder(folder)
    codes = split_codes(prefix)
    if len(codes) == 1:
        return [f"{base}/{stem}.json"]
    return [f"{base}/{code}/{stem}.json" for code in codes]


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


def find_parts(data_root: Path) -> list[str]:
    """TS_* folders beneath the data root, relative to it, sorted; `train/` alone when there is one.

    Raises UserError when the root is missing or holds no AI Hub tree.
    """
    root = Path(data_root)
    if not root.is_dir():
        raise UserError(f"{root}: the data root is not a folder; set --data-root or PILLSNAP_DATA_ROOT")
    for tree in ("train", "val"):
        parts = []
        for base in (tree, f"data/{tree}"):
            for kind in ("single", "combination"):
                images = root / base / "images" / kind
                if images.is_dir():
                    found = sorted(entry.name for entry in os.scandir(images) if entry.is_dir())
                    parts += [f"{base}/images/{kind}/{name}" for name in found]
        if parts:
            return sorted(parts)
    raise UserError(f"{root}: no AI Hub photos; expected train/images/single/TS_* (or data/train/…) beneath it")


def scan(data_root: Path, *, num_threads: int = 4, progress: Progress | None = None) -> Scan:
    """List every photo of an AI Hub tree without opening one.

    Raises UserError for a missing root, a tree in another layout and a tree without a photo.
    """
    parts = find_parts(data_root)
    builder = ScanBuilder()
    with ThreadPoolExecutor(max_workers=num_threads) as pool:
        listings = pool.map(lambda part: _list_part(os.fspath(data_root), part), parts)
        for done, (part, (folders, refused)) in enumerate(zip(parts, listings, strict=True), start=1):
            builder.refused.merge(refused)
            for name, files in folders:
                builder.add_folder(f"{part}/{name}", name, files)
            if progress is not None:
                progress("scan", done, len(parts))
    result = builder.finish()
    if not len(result):
        raise UserError(
            f"{data_root}: {len(parts)} TS_* folders but no photo named like K-000114_0_2_0_0_75_260_200.png"
        )
    return result


def _list_part(root: str, part: str) -> tuple[list[tuple[str, list[str]]], Refused]:
    refused = Refused()
    folders: list[tuple[str, list[str]]] = []
    with os.scandir(f"{root}/{part}") as entries:
        leaves = sorted(entries, key=lambda entry: entry.name)
    for leaf in leaves:
        if leaf.is_dir(follow_symlinks=False):
            folders.append((leaf.name, _list_folder(leaf.path, f"{part}/{leaf.name}", refused)))
        elif leaf.is_symlink():
            refused.add("link", f"{part}/{leaf.name}")
    return folders, refused


def _list_folder(path: str, relative: str, refused: Refused) -> list[str]:
    with os.scandir(path) as entries:
        listed = list(entries)
    names = [entry.name for entry in listed if entry.is_file(follow_symlinks=False)]
    if len(names) != len(listed):
        for entry in listed:
            if entry.is_symlink():
                refused.add("link", f"{relative}/{entry.name}")
            elif not entry.is_file(follow_symlinks=False):
                refused.add("not_a_file", f"{relative}/{entry.name}")
    names.sort()
    return names


class ScanBuilder:
    """Collects folders of file names into a Scan; used by the folder scan and by the ZIP index."""

    def __init__(self) -> None:
        self.refused = Refused()
        self._folders: list[str] = []
        self._prefixes: list[str] = []
        self._views: dict[str, int] = {}
        self._fields: list[tuple[int, ...]] = []
        self._set_sizes: list[int] = []
        self._view_index: list[np.ndarray] = []

    def add_folder(self, folder: str, expected_prefix: str, names: Iterable[str]) -> list[int]:
        """Add one folder's file names; return the positions of those that are photos, in the order added."""
        cut = len(expected_prefix)
        views = self._views
        by_prefix: dict[str, tuple[list[int], list[int]]] = {}
        if _CODES.fullmatch(expected_prefix):
            by_prefix[expected_prefix] = ([], [])
        for position, name in enumerate(names):
            view = views.get(name[cut:]) if name.startswith(expected_prefix) else None
            prefix = expected_prefix
            if view is None or prefix not in by_prefix:
                parsed = self._parse(folder, name)
                if parsed is None:
                    continue
                prefix, view = parsed
                by_prefix.setdefault(prefix, ([], []))
            by_prefix[prefix][0].append(view)
            by_prefix[prefix][1].append(position)
        kept: list[int] = []
        for prefix, (indices, positions) in by_prefix.items():
            if indices:
                self._folders.append(folder)
                self._prefixes.append(prefix)
                self._set_sizes.append(len(indices))
                self._view_index.append(np.array(indices, dtype=np.int32))
                kept += positions
        return kept

    def finish(self) -> Scan:
        """The scan of everything added."""
        return Scan(
            folders=self._folders,
            prefixes=self._prefixes,
            views=list(self._views),
            view_fields=np.array(self._fields, dtype=np.int16).reshape(-1, 7),
            set_index=np.repeat(np.arange(len(self._set_sizes), dtype=np.int32), self._set_sizes),
            view_index=np.concatenate(self._view_index) if self._view_index else np.zeros(0, dtype=np.int32),
            refused=self.refused,
        )

    def _parse(self, folder: str, name: str) -> tuple[str, int] | None:
        stem, _, extension = name.rpartition(".")
        if f".{extension.lower()}" not in _EXTENSIONS:
            self.refused.add("other_file", f"{folder}/{name}")
            return None
        prefix, _, rest = stem.partition("_")
        fields = _view_fields("_" + rest)
        if fields is None or not _CODES.fullmatch(prefix):
            self.refused.add("stray_image", f"{folder}/{name}")
            return None
        view = name[len(prefix) :]
        if view not in self._views:
            self._views[view] = len(self._fields)
            self._fields.append(fields)
        return prefix, self._views[view]


def _view_fields(view: str) -> tuple[int, ...] | None:
    match = _VIEW.fullmatch(view)
    if match is None:
        return None
    fields = tuple(map(int, match.groups()))
    return fields if max(fields) <= _INT16_MAX else None
