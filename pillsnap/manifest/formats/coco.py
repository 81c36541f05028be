"""COCO JSON: `images`, `annotations` with `bbox` = x, y, w, h in pixels, `categories`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pillsnap.errors import UserError
from pillsnap.files import write_json
from pillsnap.manifest.formats.folder import Folder
from pillsnap.manifest.formats.photo import Box, LabelledPhoto, ReadFolder
from pillsnap.manifest.formats.records import Record, attach, number, pixel_box, whole
from pillsnap.observe.work_progress import Progress, unseen

_KEYS = ("images", "annotations", "categories")


def is_coco(document: Any) -> bool:
    """Whether a parsed JSON file is a COCO data set."""
    return isinstance(document, dict) and all(isinstance(document.get(key), list) for key in _KEYS)


def read_json(folder: Folder, path: str) -> Any:
    """A parsed JSON file, or None when it is not valid JSON."""
    try:
        return json.loads((folder.root / path).read_bytes())
    except (ValueError, RecursionError):
        return None


def read_coco(photos: Folder, labels: Folder, progress: Progress = unseen) -> ReadFolder:
    """Labelled photos of all COCO files of `labels`. Crowds are left out and reported."""
    records: list[Record] = []
    names: dict[str, None] = {}
    for path in labels.paths():
        document: Any = read_json(labels, path) if path.lower().endswith(".json") else None
        if is_coco(document):
            labels.use(path)
            records += _records(path, document, names, photos)
    if not records:
        raise UserError(f"{labels.root}: no COCO file: a .json with {', '.join(_KEYS)}")
    return attach(photos, records, list(names), "coco", progress)


def _records(path: str, document: dict, names: dict[str, None], photos: Folder) -> list[Record]:
    try:
        categories = {entry["id"]: str(entry["name"]).strip() for entry in document["categories"]}
        images = {}
        for entry in document["images"]:
            name = str(entry["file_name"])
            folder = path.rpartition("/")[0]
            ways = [f"{folder}/{name}" if folder else name, name]
            if entry["id"] in images:
                raise UserError(f"{path}: two images have the id {entry['id']!r}")
            images[entry["id"]] = Record(ways, path, width=whole(entry.get("width")), height=whole(entry.get("height")))
        names |= dict.fromkeys(categories.values())
        for entry in document["annotations"]:
            where = f"{path}: annotation {entry.get('id')}"
            if entry["image_id"] not in images:
                photos.problems.add("annotation_without_image", where)
            elif entry["category_id"] not in categories:
                raise UserError(f"{where}: category {entry['category_id']!r} is not in `categories`")
            elif entry.get("iscrowd"):
                photos.problems.add("crowd", where)
            else:
                images[entry["image_id"]].pills.append((categories[entry["category_id"]], _box(entry, where)))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a COCO file ({type(error).__name__}: {error})") from error
    boxes = [box for record in images.values() for _, box in record.pills if box is not None]
    if boxes and all(max(box) <= 1 for box in boxes):
        raise UserError(f"{path}: all boxes are below 1 pixel: they seem to be normalised, COCO's are in pixels")
    return list(images.values())


def _box(entry: dict, where: str) -> Box | None:
    values = entry.get("bbox")
    if not values:
        return None
    if not isinstance(values, list) or len(values) != 4:
        raise UserError(f"{where}: bbox is not four numbers")
    x, y, w, h = (number(value, where) for value in values)
    return pixel_box(x, y, w, h, where)


def write_coco(
    photos: Sequence[LabelledPhoto],
    names: Sequence[str],
    out: Path,
    predictions: Mapping[str, list[tuple[str, Box, float]]] | None = None,
) -> None:
    """Write annotations/instances_<split>.json, and predictions_<split>.json in COCO's format of results."""
    index = {name: position for position, name in enumerate(names, start=1)}
    categories = [{"id": position, "name": name, "supercategory": "pill"} for name, position in index.items()]
    for split in dict.fromkeys(photo.split for photo in photos):
        chosen = [photo for photo in photos if photo.split == split]
        images: list[dict] = []
        annotations: list[dict] = []
        results: list[dict] = []
        for number_, photo in enumerate(chosen, start=1):
            images.append({"id": number_, "file_name": photo.path, "width": photo.width, "height": photo.height})
            for name, box in zip(photo.names, photo.boxes, strict=True):
                assert box is not None
                annotations.append({
                    "id": len(annotations) + 1, "image_id": number_, "category_id": index[name], "bbox": list(box),
                    "area": box[2] * box[3], "iscrowd": 0, "segmentation": [],
                })  # fmt: skip
            for name, box, score in (predictions or {}).get(photo.path, ()):
                results.append(
                    {"image_id": number_, "category_id": index[name], "bbox": list(box), "score": score}
                )  # fmt: skip
        folder = out / "annotations"
        folder.mkdir(parents=True, exist_ok=True)
        document = {"images": images, "annotations": annotations, "categories": categories}
        write_json(folder / f"instances_{split}.json", document)
        if predictions is not None:
            write_json(folder / f"predictions_{split}.json", results)
