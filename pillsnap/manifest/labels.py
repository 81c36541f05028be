"""Parses AI Hub label JSON: box, photo size, names, EDI codes, attributes. Workers import it: no heavy imports."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections.abc import Sequence
from typing import NamedTuple

from pillsnap.errors import UserError
from pillsnap.manifest.attributes import Texts, clean, label_attributes
from pillsnap.photos.archives import parse_location, read_place

_MAX_BYTES = 4 << 20
_SIDE_MAX = 2**31 - 1
_DIRECTIONS = {"앞면": 0, "뒷면": 1}


class Label(NamedTuple):
    """One pill's label. `problem` is empty or the reason for a missing box: missing, not_a_file, unreadable_file,
    broken, no_box, empty_box, two_boxes, other_code, other_photo (set by rows.of_photo)."""

    problem: str
    box: tuple[float, float, float, float] | None = None
    width: int = 0
    height: int = 0
    name: str = ""
    edi_codes: tuple[str, ...] = ()
    file_name: str = ""
    direction: int | None = None
    """Side that is seen, as in file names: 0 front, 1 back."""
    attributes: Texts = ()


def read_labels(root: str, jobs: Sequence[tuple[str, str]]) -> list[Label]:
    """Labels of (location under `root`, expected K-code) jobs, in order; "" is missing. Bad files do not raise."""
    return [_read_label(root, location, code) for location, code in jobs]


def _read_label(root: str, location: str, code: str) -> Label:
    if not location:
        return Label("missing")
    place = parse_location(location)
    if place is None:
        return read_label(f"{root}/{location}", code)
    try:
        return parse_label(read_place(root, place), code)
    except OSError:
        return Label("unreadable_file")
    except UserError:
        return Label("broken")


def read_label(path: str, code: str) -> Label:
    """Read one label file. Links and special files are refused: opening a FIFO would block."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return Label("missing")
    except OSError as error:  # ELOOP: a link. ENXIO: a socket.
        return Label("not_a_file" if error.errno in (errno.ELOOP, errno.ENXIO) else "unreadable_file")
    try:
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode):
            return Label("not_a_file")
        if info.st_size > _MAX_BYTES:
            return Label("broken")
        data = os.read(descriptor, info.st_size + 1)
    except OSError:
        return Label("unreadable_file")
    finally:
        os.close(descriptor)
    return parse_label(data, code)


def parse_label(data: bytes, code: str) -> Label:
    """Parse label JSON bytes (UTF-8 with or without BOM, UTF-16, CP949); types vary between redistributions."""
    try:
        document = json.loads(_text(data))
        image = document["images"][0]
        annotations = document.get("annotations") or []
        if not isinstance(image, dict) or not isinstance(annotations, list):
            return Label("broken")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return Label("broken")
    width, height = _side(image.get("width")), _side(image.get("height"))
    name = clean(image.get("dl_name"))
    edi_codes = tuple(sorted({part for part in map(str.strip, clean(image.get("di_edi_code")).split(",")) if part}))
    stated = clean(image.get("dl_mapping_code")) or clean(image.get("drug_N"))
    if stated and stated != code:
        return Label("other_code", None, width, height)
    problem, box = _box(annotations)
    file_name, direction = clean(image.get("file_name")), _DIRECTIONS.get(clean(image.get("drug_dir")))
    return Label(problem, box, width, height, name, edi_codes, file_name, direction, label_attributes(image))


def _box(annotations: list) -> tuple[str, tuple[float, float, float, float] | None]:
    """(problem, the only box). Boxes that repeat count once; of different ones, none is known to be the pill's."""
    boxes = []
    for annotation in annotations:
        values = annotation.get("bbox") if isinstance(annotation, dict) else None
        if not isinstance(values, list) or len(values) != 4:
            continue
        try:
            x, y, w, h = (float(value) for value in values)
        except (TypeError, ValueError):
            return "broken", None
        if not all(map(math.isfinite, (x, y, w, h))):
            return "broken", None
        boxes.append((x, y, w, h))
    if len(set(boxes)) > 1:
        return "two_boxes", None
    if not boxes:
        return "no_box", None
    return ("", boxes[0]) if boxes[0][2] > 0 and boxes[0][3] > 0 else ("empty_box", None)


def _text(data: bytes) -> str:
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp949")


def _side(value: object) -> int:
    try:
        side = int(float(value))  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return 0
    return side if 0 < side <= _SIDE_MAX else 0
