"""CVAT for images 1.1: one XML file with <image> elements, whose boxes have their edges in pixels."""

from __future__ import annotations

import math
from xml.etree import ElementTree

from pillsnap.errors import UserError
from pillsnap.manifest.formats.folder import Folder
from pillsnap.manifest.formats.photo import Box, ReadFolder
from pillsnap.manifest.formats.records import Record, attach, number, pixel_box, whole
from pillsnap.manifest.formats.splits import known_split
from pillsnap.manifest.formats.xml_files import read_xml, text_of
from pillsnap.observe.work_progress import Progress, unseen

_OTHER_SHAPES = ("polyline", "points", "mask", "ellipse", "cuboid", "skeleton")


def read_cvat(photos: Folder, labels: Folder, progress: Progress = unseen) -> ReadFolder:
    """Labelled photos of all CVAT files of `labels`. Boxes and polygons are read, other shapes are reported."""
    records: list[Record] = []
    names: dict[str, None] = {}
    for path in labels.paths():
        root = read_xml(labels, path) if path.lower().endswith(".xml") else None
        if root is None or root.tag != "annotations":
            continue
        labels.use(path)
        if root.find("track") is not None:
            raise UserError(f"{labels.root / path}: has tracks of a video: export it as `CVAT for images 1.1`")
        names |= dict.fromkeys(filter(None, (text_of(label, "name") for label in root.iter("label"))))
        for image in root.iter("image"):
            records.append(_record(image, path, photos))
    if not records:
        raise UserError(f"{labels.root}: no CVAT file: an .xml with <annotations> and <image>")
    names |= dict.fromkeys(name for record in records for name, _ in record.pills)
    return attach(photos, records, list(names), "cvat", progress)


def _record(image: ElementTree.Element, path: str, photos: Folder) -> Record:
    name = image.get("name", "")
    record = Record([name], path, width=whole(image.get("width")), height=whole(image.get("height")))
    record.split = known_split(image.get("subset", ""))
    for shape in image:
        where, label = f"{path}: {name}", shape.get("label", "")
        if shape.tag in _OTHER_SHAPES or (shape.tag == "tag" and label):
            photos.problems.add("shape_not_read", f"{where}: {shape.tag}")
        elif shape.tag == "box":
            record.pills.append((label, _box(shape, where)))
        elif shape.tag == "polygon":
            points = [point.split(",") for point in shape.get("points", "").split(";")]
            xs, ys = ([number(point[axis], where) for point in points] for axis in (0, -1))
            box = pixel_box(min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys), where)
            record.pills.append((label, box))
    return record


def _box(shape: ElementTree.Element, where: str) -> Box | None:
    x0, y0, x1, y1 = (number(shape.get(name), where) for name in ("xtl", "ytl", "xbr", "ybr"))
    return rotated_box(x0, y0, x1 - x0, y1 - y0, number(shape.get("rotation", 0), where), where)


def rotated_box(x: float, y: float, w: float, h: float, degrees: float, where: str) -> Box | None:
    """The bounding box of a box turned about its centre by `degrees`."""
    if not degrees:
        return pixel_box(x, y, w, h, where)
    cos, sin = abs(math.cos(math.radians(degrees))), abs(math.sin(math.radians(degrees)))
    across, down = w * cos + h * sin, w * sin + h * cos
    return pixel_box(x + w / 2 - across / 2, y + h / 2 - down / 2, across, down, where)
