"""YOLO label files: one `class cx cy w h` per line, normalised; or polygons, oriented boxes, key points."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import yaml

from pillsnap.errors import UserError
from pillsnap.manifest.formats.folder import Folder, stem_of
from pillsnap.manifest.formats.label_rows import read_pills
from pillsnap.manifest.formats.names import DataYaml, find_data_yaml, is_names_file, read_data_yaml, read_names
from pillsnap.manifest.formats.photo import Box, LabelledPhoto, ReadFolder
from pillsnap.manifest.formats.reading import read_photos
from pillsnap.manifest.formats.splits import splits_by_folder, splits_of_data_yaml
from pillsnap.observe.work_progress import Progress, unseen

LabelStyle = Literal["boxes", "polygons", "obb", "pose"]
LABEL_STYLES: tuple[str, ...] = get_args(LabelStyle)
_PHOTO_FOLDERS = ("images", "jpegimages")
NOT_LABELS = ("classes.txt", "notes.json", "obj.names", "obj.data")
"""Files of labelling tools that are no labels."""
_MAX_STEPS = 9


def has_labels(photos: Folder, labels: Folder) -> str:
    """The first label file that fits a photo, or ""."""
    return next(filter(None, (_label_of(photos, labels, photo) for photo in photos.photos)), "")


def read_yolo(
    photos: Folder,
    labels: Folder,
    names: Path | Sequence[str] | str | None,
    style: str | None = None,
    progress: Progress = unseen,
) -> ReadFolder:
    """Labelled photos of a YOLO folder.

    A label is searched in the folder `labels` in place of `images`, else beside its photo. Splits are those of the
    data.yaml (`names`, or the folder's only one), else folder names (splits.py); where none is known, they stay empty.
    Raises UserError for malformed rows, class indices without a name, and ambiguous rows.
    """
    if style is not None and style not in LABEL_STYLES:
        raise UserError(f"--labels {style!r} is none of {', '.join(LABEL_STYLES)}")
    problems = photos.problems
    data, classes, notes = _classes(labels, names)
    is_given = names is None or (data is not None and str(data.file) == str(names))
    splits = _splits(photos, labels, data, notes, is_given)
    found = {photo: _label_of(photos, labels, photo) for photo in splits}
    for label in found.values():
        labels.use(label)
    shared = _shared_labels(found)
    chosen = [photo for photo, label in found.items() if label not in shared]
    files = [f"{labels.root}/{found[photo]}" if found[photo] else "" for photo in chosen]
    reads = list(read_photos(photos.root, list(zip(chosen, files, strict=True)), progress))
    found_pills = read_pills(files, reads, len(classes), style, data)
    labelled = []
    for photo, file, read, pills in zip(chosen, files, reads, found_pills, strict=True):
        if read.problem or not file:
            problems.add(read.problem or "no_label_file", photo)
            continue
        split, source = splits[photo]
        one = LabelledPhoto(photo, read.width, read.height, split=split, source=f"yolo/{source}" if source else "yolo")
        one.names = [classes[index] for index, _ in pills]
        one.boxes = [box for _, box in pills]
        if not pills:
            problems.add("empty_label_file", found[photo])
        labelled.append(one)
    for photo, label in found.items():
        if label in shared:
            problems.add("label_of_two_photos", photo)
    places = {place for photo in photos.photos for place in label_folders(photo.rpartition("/")[0])}
    for path in labels.unused():
        if path.lower().endswith(".txt") and path.rpartition("/")[0] in places:
            problems.add("label_without_photo", path)
            labels.use(path)
    return ReadFolder(labelled, classes, {photo: split for photo, (split, _) in splits.items()}, notes)


def _classes(folder: Folder, names: Path | Sequence[str] | str | None) -> tuple[DataYaml | None, list[str], list[str]]:
    """(data.yaml that states the splits, class names, notes)."""
    if isinstance(names, str) and is_names_file(names):
        names = Path(names)
    if isinstance(names, Path) and names.suffix.lower() in (".yaml", ".yml"):
        data = read_data_yaml(names)
        return (data if data.splits else None), data.names, []
    own = find_data_yaml(folder.root)
    if names is None:
        if own is None:
            listed = [name for name in ("classes.txt", "obj.names") if folder.has(name)]
            hint = f"; {folder.root / listed[0]} looks like them" if listed else ""
            raise UserError(
                f"What are the classes called? Give --names: a data.yaml, a text file, or a list a,b,c{hint}."
            )
        return (own if own.splits else None), own.names, [f"class names: {own.file}"]
    classes = read_names(names)
    if own is None or not own.splits:
        return None, classes, []
    if len(own.names) != len(classes):
        raise UserError(f"--names has {len(classes)} classes, but {own.file} has {len(own.names)}: use its names")
    return own, classes, []


def _splits(
    folder: Folder, labels: Folder, data: DataYaml | None, notes: list[str], is_given: bool
) -> dict[str, tuple[str, str]]:
    """(split, source) by photo; photos without a split are left out and reported, or all have none."""
    if data is not None:
        try:
            found, taken = splits_of_data_yaml(folder, labels, data)
        except UserError as error:
            if is_given:
                raise
            notes.append(f"splits are those of the folder names: {error}")
        else:
            notes += [f"{split}: {', '.join(entries)} ({data.file})" for split, entries in data.splits.items()]
            notes += taken
            for photo in folder.photos:
                if photo not in found:
                    folder.problems.add("photo_not_listed", photo)
            return found
    known, unknown = splits_by_folder(folder.photos)
    if not known:
        return dict.fromkeys(folder.photos, ("", ""))
    labelled = [name for name, photos in unknown.items() if any(_label_of(folder, labels, photo) for photo in photos)]
    if labelled:
        raise UserError(
            f"{folder.root}: labelled photos in folders without a split: {', '.join(labelled[:5])}; name them "
            "train, val or test, or list them in a data.yaml (train:, val:, test:)"
        )
    for photos in unknown.values():
        for photo in photos:
            folder.problems.add("folder_without_split", photo)
    return known


@lru_cache(maxsize=65_536)
def label_folders(folder: str) -> tuple[str, ...]:
    """`images/train` -> `labels/train`, in two cases, then the folder itself: where a photo's label may be."""
    parts = folder.split("/")
    for position in reversed(range(len(parts))):
        if parts[position].lower() in _PHOTO_FOLDERS:
            ways = ("/".join([*parts[:position], name, *parts[position + 1 :]]) for name in ("labels", "Labels"))
            return (*ways, folder)
    return (folder,)


def _label_of(photos: Folder, labels: Folder, photo: str) -> str:
    """Path of a photo's label file, or ""."""
    where, stem = photo.rpartition("/")[0], stem_of(photo)
    for place in label_folders(where):
        path, respelled = labels.find(place, stem, ".txt")
        if path and path.rpartition("/")[2].lower() not in NOT_LABELS:
            if respelled:
                photos.problems.add_once("label_spelled_differently", path)
            return path
    return ""


def _shared_labels(found: dict[str, str]) -> set[str]:
    """Label files that fit two photos of a folder (a.jpg and a.png)."""
    return {label for label, count in Counter(found.values()).items() if label and count > 1}


def from_pixels(box: Box, width: int, height: int) -> Box:
    """(x, y, w, h) in pixels, float32 -> (cx, cy, w, h) normalised, which `to_pixels` turns into the same float32."""
    cx, w = _normalised(box[0], box[2], width)
    cy, h = _normalised(box[1], box[3], height)
    return cx, cy, w, h


def _normalised(low: float, extent: float, size: int) -> tuple[float, float]:
    """(centre, extent) of one axis; the centre is moved by a few units in the last place where that makes it exact."""
    wanted, share = np.float32(low), extent / size
    centre = (low + extent / 2) / size
    for steps in range(_MAX_STEPS):
        for direction in (-math.inf, math.inf):
            moved = centre
            for _ in range(steps):
                moved = math.nextafter(moved, direction)
            if np.float32((moved - share / 2) * size) == wanted:
                return moved, share
    return centre, share  # differs by less than 1e-12 pixels


def write_yolo(photos: Sequence[LabelledPhoto], names: Sequence[str], out: Path) -> None:
    """Write labels/…, data.yaml and one list of photos per split. Numbers have all digits, so pixels stay the same."""
    index = {name: position for position, name in enumerate(names)}
    lists: dict[str, list[str]] = {}
    for photo in photos:
        path = out / label_folders(photo.path.rpartition("/")[0])[0] / f"{stem_of(photo.path)}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = []
        for name, box in zip(photo.names, photo.boxes, strict=True):
            assert box is not None
            rows.append(" ".join([str(index[name]), *map(repr, from_pixels(box, photo.width, photo.height))]) + "\n")
        path.write_text("".join(rows), encoding="utf-8")
        lists.setdefault(photo.split, []).append(photo.path)
    for split, paths in lists.items():
        (out / f"{split}.txt").write_text("".join(f"./{path}\n" for path in paths), encoding="utf-8")
    document = {split: f"{split}.txt" for split in lists} | {"nc": len(names), "names": list(names)}
    (out / "data.yaml").write_text(yaml.safe_dump(document, allow_unicode=True, sort_keys=False), encoding="utf-8")
