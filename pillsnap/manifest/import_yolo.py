"""Imports a YOLO-format folder (as Roboflow and ultralytics write it) into a manifest."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import yaml

from pillsnap.errors import UserError
from pillsnap.manifest.import_report import Problems, write_report
from pillsnap.manifest.table import SCHEMA, check_code, class_list, has_control_characters, write_manifest
from pillsnap.photos.decode import BadImage, Header, read_header

_EXTENSIONS = (".jpg", ".jpeg", ".png")
_HEADER_BYTES = 256 << 10


def import_yolo(
    folder: Path,
    names: Path | Sequence[str] | str,
    out_dir: Path,
    group_by: str | None = None,
    val_splits: Sequence[str] = ("val", "valid", "test"),
) -> Path:
    """Turn a YOLO-format folder into a manifest whose data root is `folder`; return the Parquet path.

    Layouts: images/<split>/ with labels/<split>/, and <split>/images with <split>/labels. `names`: a data.yaml, a text
    file with one class per line, a list, or a comma-separated string. `group_by`: a regular expression; its first group
    (or whole match) in the file name is the photo's group, so that augmented versions of a photo stay in one split.
    Boxes are converted to pixels of the upright photo. import_report.json lists what was left out.
    Raises UserError for a missing folder, unknown class indices, malformed lines and groups in both splits.
    """
    folder = Path(folder)
    classes = read_names(names)
    pattern = _compile(group_by)
    splits = _find_splits(folder)
    problems = Problems()
    rows = []
    for split, images, labels in splits:
        side = "val" if split in val_splits else "train"
        for path in _list_photos(images, folder, problems):
            row = _read_photo(folder, path, labels, classes, problems)
            if row is not None:
                row |= {"group": _group(pattern, path), "split": side, "source": f"yolo/{split}"}
                rows.append(row)
    if not rows:
        raise UserError(f"{folder}: no readable photos (.jpg, .png) in {', '.join(str(s[1]) for s in splits)}")
    rows = _drop_unlearnable(rows, problems)
    _check_groups(rows, folder)
    rows.sort(key=lambda row: row["sample_id"])
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    written = write_manifest(table, out_dir, class_list(table, {name: name for name in classes}))
    write_report(out_dir, table, problems)
    return written


def read_names(names: Path | Sequence[str] | str) -> list[str]:
    """Class names in index order, from a data.yaml, a text file, a list or a comma-separated string."""
    if isinstance(names, str):
        path = Path(names)
        if "," in names or not path.is_file():
            return _checked([part.strip() for part in names.split(",")], "--names")
        names = path
    if not isinstance(names, Path):
        return _checked([str(name) for name in names], "--names")
    try:
        text = names.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{names}: cannot read class names ({error.__class__.__name__}); give a UTF-8 file") from error
    if names.suffix.lower() not in (".yaml", ".yml"):
        return _checked([line.strip() for line in text.splitlines() if line.strip()], str(names))
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{names}: not valid YAML ({' '.join(str(error).split())})") from error
    listed = document.get("names") if isinstance(document, dict) else None
    if isinstance(listed, dict):
        if sorted(listed) != list(range(len(listed))):
            raise UserError(f"{names}: the keys of `names` are not 0 to {len(listed) - 1}")
        listed = [listed[index] for index in range(len(listed))]
    if not isinstance(listed, list) or not listed:
        raise UserError(f"{names}: has no `names` list; add one or pass --names as a list")
    return _checked([str(name) for name in listed], str(names))


def _checked(classes: list[str], where: str) -> list[str]:
    if not classes:
        raise UserError(f"{where}: no class names")
    for name in classes:
        check_code(name, where)
    if len(set(classes)) != len(classes):
        raise UserError(f"{where}: class names must differ, got {classes}")
    return classes


def _compile(group_by: str | None) -> re.Pattern[str] | None:
    if group_by is None:
        return None
    try:
        return re.compile(group_by)
    except re.error as error:
        raise UserError(f"--group-by {group_by!r}: not a regular expression ({error})") from error


def _group(pattern: re.Pattern[str] | None, path: str) -> str:
    name = path.rpartition("/")[2]
    match = pattern.search(name) if pattern is not None else None
    if match is None:
        return (path if pattern is None else name).rpartition(".")[0]
    return match.group(1) if match.re.groups and match.group(1) is not None else match.group(0)


def _find_splits(folder: Path) -> list[tuple[str, Path, Path]]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    images = folder / "images"
    if images.is_dir():
        names = sorted(entry.name for entry in images.iterdir() if entry.is_dir())
        found = [(name, images / name, folder / "labels" / name) for name in names]
        if not found:
            found = [("train", images, folder / "labels")]
    else:
        names = sorted(entry.name for entry in folder.iterdir() if (entry / "images").is_dir())
        found = [(name, folder / name / "images", folder / name / "labels") for name in names]
    if not found:
        raise UserError(f"{folder}: not a YOLO folder; expected images/<split>/ + labels/<split>/ or <split>/images/")
    return found


def _list_photos(images: Path, folder: Path, problems: Problems) -> list[str]:
    base = images.relative_to(folder).as_posix()
    found = []
    with os.scandir(images) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            path = f"{base}/{entry.name}"
            if has_control_characters(entry.name):
                problems.add("unreadable_name", path)
            elif not entry.name.lower().endswith(_EXTENSIONS):
                problems.add("other_file", path)
            elif not entry.is_file(follow_symlinks=False):
                problems.add("link_or_not_a_file", path)
            else:
                found.append(path)
    return found


def _read_photo(folder: Path, path: str, labels: Path, classes: list[str], problems: Problems) -> dict | None:
    stem = path.rpartition("/")[2].rpartition(".")[0]
    try:
        header = _header(folder / path)
    except BadImage as error:
        problems.add(error.reason, path)
        return None
    label_path = labels / f"{stem}.txt"
    if not label_path.is_file():
        # An empty label file means "no pill"; with a missing one, pills would be trained as background.
        problems.add("no_label_file", path)
        return None
    codes: list[str] = []
    boxes: list[list[float]] = []
    for number, line in enumerate(_label_text(label_path).splitlines(), start=1):
        if line.strip():
            index, box = _parse_line(line, f"{label_path}: line {number}", len(classes))
            codes.append(classes[index])
            boxes.append(_to_pixels(box, header))
    return {
        "sample_id": path.rpartition(".")[0],
        "image_path": path,
        "image_type": "combination" if len(codes) > 1 else "single",
        "codes": codes,
        "boxes": boxes,
        "width": header.width,
        "height": header.height,
    }


def _header(path: Path) -> Header:
    with path.open("rb") as file:
        head = file.read(_HEADER_BYTES)
        try:
            return read_header(head)
        except BadImage as error:
            # In a JPEG, a long colour profile or thumbnail may precede the size.
            if error.reason != "truncated" or len(head) < _HEADER_BYTES:
                raise
            return read_header(head + file.read())


def _label_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({error.__class__.__name__})") from error


def _parse_line(line: str, where: str, num_classes: int) -> tuple[int, tuple[float, float, float, float]]:
    """(class index, (cx, cy, w, h) normalised) of one label line; a polygon gives its bounding box."""
    fields = line.split()
    try:
        index = int(fields[0])
        values = np.array([float(value) for value in fields[1:]])
    except ValueError as error:
        raise UserError(f"{where}: not numbers: {line.strip()[:80]!r}") from error
    if not 0 <= index < num_classes:
        raise UserError(f"{where}: class index {index}, but --names has {num_classes} classes")
    if not np.isfinite(values).all():
        raise UserError(f"{where}: not finite: {line.strip()[:80]!r}")
    if len(values) == 4:
        cx, cy, w, h = values.tolist()
    elif len(values) >= 6 and len(values) % 2 == 0:
        (left, top), (right, bottom) = values.reshape(-1, 2).min(axis=0), values.reshape(-1, 2).max(axis=0)
        cx, cy, w, h = (left + right) / 2, (top + bottom) / 2, right - left, bottom - top
    else:
        raise UserError(f"{where}: expected `class cx cy w h` or a polygon, got {len(fields)} fields")
    if w <= 0 or h <= 0 or max(abs(cx), abs(cy), w, h) > 2:
        raise UserError(f"{where}: box {cx:g} {cy:g} {w:g} {h:g} is empty or not normalised to 0..1")
    return index, (float(cx), float(cy), float(w), float(h))


def _to_pixels(box: tuple[float, float, float, float], header: Header) -> list[float]:
    cx, cy, w, h = box
    return [(cx - w / 2) * header.width, (cy - h / 2) * header.height, w * header.width, h * header.height]


def _drop_unlearnable(rows: list[dict], problems: Problems) -> list[dict]:
    learnable = {code for row in rows if row["split"] == "train" for code in row["codes"]}
    if not learnable:
        raise UserError("no pill is labelled in a training split; name the training folder `train`")
    kept = []
    for row in rows:
        if learnable.issuperset(row["codes"]):
            kept.append(row)
        else:
            problems.add("class_only_in_validation", row["image_path"])
    return kept


def _check_groups(rows: list[dict], folder: Path) -> None:
    sides: dict[str, set[str]] = {}
    for row in rows:
        sides.setdefault(row["group"], set()).add(row["split"])
    both = sorted(group for group, seen in sides.items() if len(seen) > 1)
    if both:
        raise UserError(
            f"{folder}: {len(both)} groups are in train and in val ({', '.join(both[:5])}…); move their photos to one "
            "split or change --group-by"
        )
