"""Labels that name their photo (COCO, VOC, CVAT, Label Studio, CSV): finds the photos, checks sizes and splits."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import unquote

from pillsnap.errors import UserError
from pillsnap.manifest.formats.folder import Folder
from pillsnap.manifest.formats.photo import Box, LabelledPhoto, ReadFolder
from pillsnap.manifest.formats.reading import read_photos
from pillsnap.manifest.formats.splits import known_split, splits_by_folder
from pillsnap.observe.work_progress import Progress


@dataclass
class Record:
    """Labels of one photo, as a label file states them."""

    ways: list[str]
    """Paths by which the photo may be found, the likeliest first; the last component alone is tried after them."""
    where: str
    """Label file, relative to its root."""
    pills: list[tuple[str, Box | None]] = field(default_factory=list)
    width: int = 0
    height: int = 0
    split: str = ""
    """What the labels say; empty: the folder of the photo, then the name of the label file."""


def pixel_box(x: float, y: float, w: float, h: float, where: str) -> Box | None:
    """The box in pixels; None when it has no area. Raises UserError for numbers that are not finite."""
    if not all(map(math.isfinite, (x, y, w, h))):
        raise UserError(f"{where}: box {x:g} {y:g} {w:g} {h:g} is not finite")
    return (x, y, w, h) if w > 0 and h > 0 else None


def number(value: object, where: str) -> float:
    """A number, also as text. Raises UserError."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise UserError(f"{where}: {value!r} is not a number") from None


def whole(value: object) -> int:
    """A size in pixels; 0 where it is not stated."""
    try:
        return max(0, int(float(value)))  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return 0


def attach(
    photos: Folder, records: Sequence[Record], names: Sequence[str], source: str, progress: Progress
) -> ReadFolder:
    """Labelled photos of `records`. Photos without a record, records without a photo, and photos of another size than
    stated are left out and reported. Raises UserError where labels, folder and file name state two splits.
    """
    problems = photos.problems
    by_name: dict[str, list[str]] = {}
    for path in photos.photos:
        by_name.setdefault(_form(path.rpartition("/")[2]), []).append(path)
    known, _ = splits_by_folder(photos.photos)
    found: dict[str, Record] = {}
    for record in records:
        path = _photo_of(photos, by_name, record)
        if not path:
            problems.add("label_without_photo", f"{record.where}: {record.ways[0]}")
        elif path in found:
            raise UserError(f"{record.where}: {path} has labels in {found[path].where}, too: remove one")
        else:
            found[path] = record
    splits = {path: known[path][0] if path in known else "" for path in photos.photos}
    for path in photos.photos:
        if path not in found:
            problems.add("no_label_file", path)
    for path, record in found.items():
        splits[path] = _split(path, record, splits[path])
    labelled = []
    reads = read_photos(photos.root, [(path, "") for path in found], progress)
    for (path, record), read in zip(found.items(), reads, strict=True):
        if read.problem:
            problems.add(read.problem, path)
            continue
        stated = (record.width, record.height)
        if 0 not in stated and stated != (read.width, read.height):
            problems.add(
                "other_size", f"{path} ({read.width} x {read.height}, the label says {stated[0]} x {stated[1]})"
            )
            continue
        for name, box in record.pills:
            if box is None:
                problems.add("pill_without_box", f"{path}: {name}")
        if not record.pills:
            problems.add("photo_without_pills", path)
        labelled.append(
            LabelledPhoto(
                path, read.width, read.height, [name for name, _ in record.pills], [box for _, box in record.pills],
                splits[path], source,
            )
        )  # fmt: skip
    return ReadFolder(labelled, list(names), splits)


def _photo_of(photos: Folder, by_name: dict[str, list[str]], record: Record) -> str:
    for way in record.ways:
        path = way.replace("\\", "/").removeprefix("./")
        for form in dict.fromkeys((path, unicodedata.normalize("NFC", path), unicodedata.normalize("NFD", path))):
            if photos.has(form):
                return form
    for way in record.ways:
        name = way.replace("\\", "/").rpartition("/")[2]
        for form in dict.fromkeys((name, unquote(name))):
            fits = by_name.get(_form(form), [])
            if len(fits) > 1:
                raise UserError(f"{record.where}: {form!r} may be {fits[0]} or {fits[1]}: write paths, or rename one")
            if fits:
                return fits[0]
    return ""


def _split(path: str, record: Record, of_folder: str) -> str:
    words = record.where.lower().replace("\\", "/").replace(".", "/").replace("_", "/").replace("-", "/").split("/")
    of_file = {known_split(word) for word in words} - {""}
    stated = record.split or of_folder or (of_file.pop() if len(of_file) == 1 else "")
    if record.split and of_folder and record.split != of_folder:
        raise UserError(f"{record.where}: says {record.split} for {path}, whose folder says {of_folder}")
    return stated


def _form(name: str) -> str:
    return unicodedata.normalize("NFC", name)
