"""Rows of YOLO label files: plain boxes of many files at once, everything else row by row, with exact positions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import numpy as np

from pillsnap.errors import UserError
from pillsnap.manifest.formats.names import DataYaml
from pillsnap.manifest.formats.photo import Box
from pillsnap.manifest.formats.reading import Read

_CHUNK = 10_000
_PLAIN = b"0123456789.+-eE \t\r\n"
Pills = list[tuple[int, Box]]
"""Class index and box in pixels of the upright photo, per pill."""
Row = tuple[float, ...]
"""Line number and the numbers of the line."""


def read_pills(
    files: Sequence[str], reads: Sequence[Read], num_classes: int, style: str | None, data: DataYaml | None
) -> list[Pills]:
    """Pills of each photo. `files` are the labels' paths; `style` is searched in the rows and the data.yaml if None.

    Raises UserError with file and line for malformed and ambiguous rows, and class indices of `num_classes` or more.
    """
    plain = _plain_pills(reads, num_classes)
    if plain is not None:
        return plain
    rows = [_rows(file, read.label) for file, read in zip(files, reads, strict=True)]
    style = style or _style(data, files, rows)
    found = []
    for file, read, file_rows in zip(files, reads, rows, strict=True):
        pills: Pills = []
        for line, *values in file_rows:
            try:
                index, box = parse_row(values, "", num_classes, style)
            except UserError as error:
                raise UserError(f"{file}: line {int(line)}{error}") from None
            pills.append((index, to_pixels(box, read.width, read.height)))
        found.append(pills)
    return found


def _plain_pills(reads: Sequence[Read], num_classes: int) -> list[Pills] | None:
    """Pills of each photo when every row of every label is a valid `class cx cy w h`; None otherwise."""
    found: list[Pills] = []
    for start in range(0, len(reads), _CHUNK):
        pills = _plain_chunk(reads[start : start + _CHUNK], num_classes)
        if pills is None:
            return None
        found += pills
    return found


def _plain_chunk(reads: Sequence[Read], num_classes: int) -> list[Pills] | None:
    text = b"".join(read.label + b"\n" for read in reads)
    if text.translate(None, _PLAIN):
        return None
    characters = np.frombuffer(text, np.uint8)
    is_space = characters <= ord(" ")
    begins = ~is_space
    begins[1:] &= is_space[:-1]
    fields = np.diff(np.cumsum(begins, dtype=np.int32)[characters == ord("\n")], prepend=0)
    is_row = fields == 5
    if not (is_row | (fields == 0)).all():
        return None
    try:
        values = np.array(list(map(float, text.split()))).reshape(-1, 5)
    except ValueError:
        return None
    lines = np.array([read.label.count(b"\n") + 1 for read in reads])
    counts = np.add.reduceat(is_row, np.cumsum(lines) - lines, dtype=np.int64)
    index, cx, cy, w, h = values.T
    valid = np.isfinite(values).all(1) & (index == np.floor(index)) & (index >= 0) & (index < num_classes)
    valid &= (w > 0) & (h > 0) & (np.abs(values[:, 1:]).max(1, initial=0) <= 2)
    if not valid.all():
        return None
    width, height = np.repeat([(read.width, read.height) for read in reads], counts, axis=0).T
    boxes = zip(*(column.tolist() for column in to_pixels((cx, cy, w, h), width, height)), strict=True)
    pills = zip(index.astype(int).tolist(), boxes, strict=True)
    return [list(islice(pills, count)) for count in counts.tolist()]


def _style(data: DataYaml | None, files: Sequence[str], rows: Sequence[Sequence[Row]]) -> str:
    """Style of the rows, where it is certain. Key points have a constant number of fields and a `kpt_shape`."""
    if data is not None and data.has_key_points:
        return "pose"
    lengths = {len(row) - 1 for file_rows in rows for row in file_rows if len(row) - 1 != 5}
    if not lengths:
        return "boxes"
    if data is not None or len(lengths) > 1:
        return "polygons"
    (length,) = lengths
    if length < 7 or length % 2 == 0:
        return "polygons"  # parse_row refuses it, with its line
    file, row = next(
        (file, row) for file, file_rows in zip(files, rows, strict=True) for row in file_rows if len(row) - 1 == length
    )
    raise UserError(
        f"{file}: line {int(row[0])}: {length} fields may be a polygon, an oriented box or key points; "
        "say which by --labels polygons, obb or pose"
    )


def parse_row(values: Sequence[float], where: str, num_classes: int, style: str = "boxes") -> tuple[int, Box]:
    """(class index, (cx, cy, w, h) normalised) of one label row; a polygon or oriented box gives its bounding box."""
    if not all(map(math.isfinite, values)):
        raise UserError(f"{where}: not finite: {_shown(values)}")
    index = int(values[0])
    if index != values[0]:
        raise UserError(f"{where}: class index {values[0]:g} is not a whole number")
    if not 0 <= index < num_classes:
        raise UserError(f"{where}: class index {index}, but --names has {num_classes} classes")
    count = len(values) - 1
    if count == 4 or (style == "pose" and count > 4):
        cx, cy, w, h = values[1:5]
    elif (style == "polygons" and count >= 6 and count % 2 == 0) or (style == "obb" and count == 8):
        left, right = min(values[1::2]), max(values[1::2])
        top, bottom = min(values[2::2]), max(values[2::2])
        cx, cy, w, h = (left + right) / 2, (top + bottom) / 2, right - left, bottom - top
    else:
        hint = "; a sixth field may be a score: labels have none" if count == 5 else ""
        expected = {"boxes": "", "polygons": " or a polygon", "obb": " or four corners", "pose": " and key points"}
        raise UserError(f"{where}: expected `class cx cy w h`{expected[style]}, got {count + 1} fields{hint}")
    if w <= 0 or h <= 0 or max(abs(cx), abs(cy), w, h) > 2:
        raise UserError(f"{where}: box {cx:g} {cy:g} {w:g} {h:g} is empty or not normalised to 0..1")
    return index, (cx, cy, w, h)


def to_pixels(box: Any, width: Any, height: Any) -> Any:
    """(cx, cy, w, h) normalised -> (x, y, w, h) in pixels; numbers or arrays."""
    cx, cy, w, h = box
    return (cx - w / 2) * width, (cy - h / 2) * height, w * width, h * height


def _shown(values: Iterable[float]) -> str:
    return " ".join(f"{value:g}" for value in values)[:80]


def _rows(path: str, label: bytes) -> list[Row]:
    try:
        text = label.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read as text ({error.__class__.__name__})") from error
    rows: list[Row] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                rows.append((number, *map(float, line.split())))
            except ValueError as error:
                raise UserError(f"{path}: line {number}: not numbers: {line.strip()[:80]!r}") from error
    return rows
