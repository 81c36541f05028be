"""Pascal VOC: one XML file per photo, with edges in pixels; lists of splits in ImageSets/Main.

Edges are those of labelImg, CVAT and Roboflow: a box from `xmin` to `xmax` is xmax - xmin wide. (VOC2012 itself counts
pixels from 1 and includes the last one: there, boxes come out one pixel narrower.)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from pillsnap.errors import UserError
from pillsnap.manifest.formats.folder import Folder, is_photo, stem_of
from pillsnap.manifest.formats.photo import Box, LabelledPhoto, ReadFolder
from pillsnap.manifest.formats.records import Record, attach, number, pixel_box, whole
from pillsnap.manifest.formats.splits import known_split
from pillsnap.manifest.formats.xml_files import read_xml, text_of
from pillsnap.observe.work_progress import Progress, unseen

_EDGES = ("xmin", "ymin", "xmax", "ymax")


def read_voc(photos: Folder, labels: Folder, progress: Progress = unseen) -> ReadFolder:
    """Labelled photos of all VOC files of `labels`. Raises UserError for edges that are no numbers."""
    stated = _stated_splits(labels)
    by_stem: dict[str, list[str]] = {}
    for photo in photos.photos:
        by_stem.setdefault(stem_of(photo), []).append(photo)
    records = []
    for path in labels.paths():
        if not path.lower().endswith(".xml"):
            continue
        root = read_xml(labels, path)
        if root.tag != "annotation":
            continue
        labels.use(path)
        records.append(_record(root, path, by_stem, stated, str(labels.root)))
    if not records:
        raise UserError(f"{labels.root}: no Pascal VOC file: an .xml with <annotation>")
    names = sorted({name for record in records for name, _ in record.pills})
    return attach(photos, records, names, "voc", progress)


def _record(
    root: ElementTree.Element, path: str, by_stem: dict[str, list[str]], stated: dict[str, str], base: str
) -> Record:
    where = f"{base}/{path}"
    file_name, folder, full = (text_of(root, name) for name in ("filename", "folder", "path"))
    ways = [way for way in (full if full[:1] not in ("/", "") else "", f"{folder}/{file_name}", file_name) if way]
    # Many tools write names without an ending, or those of another computer: VOC pairs files by their name.
    own = by_stem.get(stem_of(path), [])
    if len(own) == 1 and not (is_photo(file_name) and stem_of(file_name) != stem_of(path)):
        ways.append(own[0])
    inside = path.rpartition(".")[0]
    split = next((stated[name] for name in (inside.partition("/")[2], stem_of(path)) if name in stated), "")
    size = root.find("size")
    record = Record(ways or [path], path, split=split)
    if size is not None:
        record.width, record.height = whole(text_of(size, "width")), whole(text_of(size, "height"))
    for item in root.iter("object"):
        name, box = text_of(item, "name"), item.find("bndbox")
        if not name:
            raise UserError(f"{where}: an <object> has no <name>")
        if box is None and item.find("robndbox") is not None:
            raise UserError(f"{where}: <robndbox> (rotated boxes) cannot be read: export axis-aligned boxes")
        record.pills.append((name, None if box is None else _box(box, where)))
    return record


def _box(element: ElementTree.Element, where: str) -> Box | None:
    x0, y0, x1, y1 = (number(text_of(element, name), where) for name in _EDGES)
    return pixel_box(x0, y0, x1 - x0, y1 - y0, where)


def _stated_splits(labels: Folder) -> dict[str, str]:
    """Split by photo name, from ImageSets/Main/<split>.txt. Other lists (trainval, per class) are no splits."""
    stated: dict[str, str] = {}
    for path in labels.paths():
        folder, _, name = path.rpartition("/")
        split = known_split(name.removesuffix(".txt"))
        if folder.endswith("ImageSets/Main"):
            labels.use(path)
            for line in (labels.root / path).read_text(encoding="utf-8-sig").splitlines() if split else ():
                if line.strip() and stated.setdefault(line.strip(), split) != split:
                    raise UserError(f"{labels.root / path}: {line.strip()} is in {stated[line.strip()]}, too")
    return stated


def write_voc(photos: Sequence[LabelledPhoto], out: Path) -> None:
    """Write Annotations/<path of the photo>.xml and ImageSets/Main/<split>.txt."""
    lists: dict[str, list[str]] = {}
    for photo in photos:
        folder, _, name = photo.path.rpartition("/")
        root = ElementTree.Element("annotation")
        for tag, text in (("folder", folder), ("filename", name), ("path", photo.path)):
            ElementTree.SubElement(root, tag).text = text
        size = ElementTree.SubElement(root, "size")
        for tag, value in (("width", photo.width), ("height", photo.height), ("depth", 3)):
            ElementTree.SubElement(size, tag).text = str(value)
        for pill, box in zip(photo.names, photo.boxes, strict=True):
            assert box is not None
            item = ElementTree.SubElement(root, "object")
            ElementTree.SubElement(item, "name").text = pill
            edges = ElementTree.SubElement(item, "bndbox")
            x, y, w, h = box
            for tag, edge in zip(_EDGES, (x, y, x + w, y + h), strict=True):
                ElementTree.SubElement(edges, tag).text = repr(edge)
        stem = photo.path.rpartition(".")[0]
        path = out / "Annotations" / f"{stem}.xml"
        path.parent.mkdir(parents=True, exist_ok=True)
        ElementTree.indent(root)
        path.write_text(ElementTree.tostring(root, encoding="unicode") + "\n", encoding="utf-8")
        lists.setdefault(photo.split, []).append(stem)
    for split, stems in lists.items():
        path = out / "ImageSets/Main" / f"{split}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{stem}\n" for stem in stems), encoding="utf-8")
