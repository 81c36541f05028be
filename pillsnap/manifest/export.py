"""Writes a manifest's labels in the formats of other tools, with predictions as pre-annotations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pillsnap.errors import UserError
from pillsnap.manifest.formats.coco import write_coco
from pillsnap.manifest.formats.label_studio import write_label_studio
from pillsnap.manifest.formats.photo import Box, LabelledPhoto
from pillsnap.manifest.formats.reading import photo_size
from pillsnap.manifest.formats.voc import write_voc
from pillsnap.manifest.formats.yolo import write_yolo
from pillsnap.manifest.table import CLASSES_NAME, read_classes, read_manifest

FORMATS = ("coco", "yolo", "voc", "label-studio")
Predictions = Mapping[str, list[tuple[str, Box, float]]]
"""(code, box in pixels, score) of the pills found, by image path."""


def export_manifest(
    manifest: Path,
    form: str,
    out: Path,
    data_root: Path | None = None,
    predictions: Predictions | None = None,
) -> dict[str, int]:
    """Write the labels of a manifest into `out`; return the number of photos written and left out, by reason.

    Paths are relative to the data root: `manifest import OUT --data-root ROOT` gives the same boxes and classes, to the
    last bit. Photos with pills without a box are left out: other formats would make them background; Label
    Studio, which is for labelling, gets all. `data_root`: for sizes that the manifest does not know. Raises UserError
    for an unknown format, sizes that stay unknown, and files that exist.
    """
    if form not in FORMATS:
        raise UserError(f"--format {form!r} is none of {', '.join(FORMATS)}")
    if predictions is not None and form not in ("coco", "label-studio"):
        raise UserError("--run adds predictions: give --format label-studio or coco")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out}: is not empty; give a new folder")
    table = read_manifest(manifest)
    if "archive" in table.column_names and table["archive"].null_count < len(table):
        raise UserError(f"{manifest}: has photos in ZIP archives, which other tools cannot read: unpack them")
    class_file = (manifest if manifest.is_dir() else manifest.parent) / CLASSES_NAME
    codes = {code for row in table["codes"].to_pylist() for code in row}
    known = [info.code for info in read_classes(class_file)] if class_file.is_file() else []
    names = [*known, *sorted(codes - set(known))]
    photos, left_out = [], 0
    for row in table.to_pylist():
        if form != "label-studio" and None in row["boxes"]:
            left_out += 1
            continue
        photo = LabelledPhoto(
            row["image_path"], row["width"], row["height"], row["codes"],
            [None if box is None else (box[0], box[1], box[2], box[3]) for box in row["boxes"]], row["split"],
        )  # fmt: skip
        if not photo.width or not photo.height:
            if data_root is None:
                raise UserError(f"{manifest}: the size of {photo.path} is not known: give --data-root")
            photo.width, photo.height = photo_size(str(data_root), photo.path)
        photos.append(photo)
    if not photos:
        raise UserError(f"{manifest}: no photo has all its boxes: nothing to export")
    if form == "coco":
        write_coco(photos, names, out, predictions)
    elif form == "yolo":
        out.mkdir(parents=True, exist_ok=True)
        write_yolo(photos, names, out)
    elif form == "voc":
        write_voc(photos, out)
    else:
        write_label_studio(photos, out, predictions)
    return {"written": len(photos), "with unlabelled pills, left out": left_out}
