"""Which photo is in which split: what a data.yaml says, else folder names from a fixed list. Never a guess."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from pillsnap.errors import UserError
from pillsnap.manifest.formats.folder import Folder
from pillsnap.manifest.formats.names import DataYaml

SPLIT_FOLDERS = {
    "train": ("train", "train2017", "training", "obj_train_data"),
    "val": ("val", "valid", "validation", "val2017", "obj_valid_data", "obj_validation_data"),
    "test": ("test", "test2017", "obj_test_data"),
}
"""Folder names, in any case, by split: those of COCO, Roboflow, ultralytics and CVAT."""
_SPLIT_OF = {name: split for split, names in SPLIT_FOLDERS.items() for name in names}


def known_split(name: str) -> str:
    """The split that a folder or file name stands for, or ""."""
    return _SPLIT_OF.get(name.lower(), "")


def splits_by_folder(photos: Iterable[str]) -> tuple[dict[str, tuple[str, str]], dict[str, list[str]]]:
    """((split, folder name) by photo, photos by folder without a split). Raises UserError for two splits in a path."""
    known: dict[str, tuple[str, str]] = {}
    unknown: dict[str, list[str]] = {}
    by_folder: dict[str, tuple[str, str]] = {}
    for photo in photos:
        folder = photo.rpartition("/")[0]
        if folder not in by_folder:
            named = [(known_split(part), part) for part in folder.split("/") if known_split(part)]
            if len({split for split, _ in named}) > 1:
                raise UserError(f"{folder}: the path names two splits; rename a folder, or list them in a data.yaml")
            by_folder[folder] = named[-1] if named else ("", "")
        if by_folder[folder][0]:
            known[photo] = by_folder[folder]
        else:
            unknown.setdefault(folder, []).append(photo)
    return known, unknown


def splits_of_data_yaml(folder: Folder, labels: Folder, data: DataYaml) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """((split, folder or list name) by photo, notes for people), as the data.yaml says.

    Entries are looked up under `path`, beside the file and under the data root; where they name folders of another
    disk, the longest end of the path that exists under the data root is taken, and noted. Raises UserError for an entry
    of train or val that does not exist, and for a photo in two splits.
    """
    found: dict[str, tuple[str, str]] = {}
    notes: list[str] = []
    for split, entries in data.splits.items():
        for entry in entries:
            list_file = _list_file(labels, data, entry)
            path = None if list_file else _locate(folder, data, entry, notes)
            if path is None and list_file is None:
                if split == "test":
                    folder.problems.add("listed_split_missing", f"test: {entry}")
                    continue
                raise UserError(f"{data.file}: `{split}: {entry}` is no folder or file under {folder.root}")
            if list_file is not None:
                photos, name = _listed_photos(folder, labels, list_file), split
            else:
                inside = f"{path}/" if path else ""
                photos = [photo for photo in folder.photos if photo.startswith(inside)]
                name = next((part for part in reversed(inside.split("/")) if known_split(part)), split)
            for photo in photos:
                other = found.setdefault(photo, (split, name))
                if other[0] != split:
                    raise UserError(f"{data.file}: {photo} is in {other[0]} and in {split}; list it in one split")
    return found, notes


def _list_file(labels: Folder, data: DataYaml, entry: str) -> Path | None:
    """The text file of photos that an entry names, or None."""
    if not entry.lower().endswith(".txt"):
        return None
    bases = (Path(data.file.parent, data.path), data.file.parent, labels.root)
    return next((Path(base, entry) for base in bases if Path(base, entry).is_file()), None)


def _listed_photos(folder: Folder, labels: Folder, file: Path) -> list[str]:
    """Photos that a text file lists, one per line, relative to it or to the data root."""
    path = _relative(labels, file) or file.name
    labels.use(path)
    bases = [path.rpartition("/")[0], ""]
    photos = []
    root = os.path.abspath(folder.root)
    for line in filter(None, map(str.strip, file.read_text(encoding="utf-8-sig").splitlines())):
        parts = [part for part in line.replace("\\", "/").split("/") if part not in ("", ".")]
        ways = ["/".join(filter(None, [base, *parts])) for base in bases]
        ways += [os.path.relpath(line, root)] if line.startswith(root) else []
        ways += ["/".join(parts[cut:]) for cut in range(1, len(parts))]
        photo = next((way for way in ways if folder.has(way)), None)
        if photo is None:
            folder.problems.add("listed_photo_missing", f"{path}: {line}")
        else:
            photos.append(photo)
    return photos


def _locate(folder: Folder, data: DataYaml, entry: str, notes: list[str]) -> str | None:
    """The entry's path relative to the data root, or None."""
    beside = data.file.parent
    bases = [Path(beside, data.path), beside, folder.root]
    entry = entry.replace("\\", "/").rstrip("/")
    shortened = [entry, *([entry[3:]] if entry.startswith("../") else [])]  # Roboflow writes ../train/images
    for base in bases:
        for way in shortened:
            path = _relative(folder, Path(base, way))
            if path is not None:
                return path
    parts = [part for part in entry.split("/") if part not in ("", ".", "..")]
    for cut in range(1, len(parts)):
        path = _relative(folder, Path(folder.root, *parts[cut:]))
        if path is not None:
            notes.append(f"{data.file.name}: {entry} is taken to be {path} under {folder.root}")
            return path
    return None


def _relative(folder: Folder, path: Path) -> str | None:
    """`path` relative to the data root if it is a folder or file of it."""
    for root, absolute in (
        (os.path.abspath(folder.root), os.path.abspath(path)),
        (os.path.realpath(folder.root), os.path.realpath(path)),
    ):
        relative = os.path.relpath(absolute, root)
        relative = "" if relative == "." else relative
        if relative in folder.files or folder.has(relative):
            return relative
    return None
