"""Recognises the format of a folder's labels, and reads it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from pillsnap.errors import UserError
from pillsnap.manifest.aihub import CODES
from pillsnap.manifest.formats.coco import is_coco, read_coco, read_json
from pillsnap.manifest.formats.cvat import read_cvat
from pillsnap.manifest.formats.folder import Folder
from pillsnap.manifest.formats.label_studio import is_label_studio, read_label_studio
from pillsnap.manifest.formats.photo import ReadFolder
from pillsnap.manifest.formats.tables import box_columns, read_box_csv, read_header, read_image_folder
from pillsnap.manifest.formats.voc import read_voc
from pillsnap.manifest.formats.xml_files import root_tag
from pillsnap.manifest.formats.yolo import has_labels, read_yolo
from pillsnap.observe.work_progress import Progress

Reader = Callable[[Folder, Folder, Progress], ReadFolder]
_READERS: dict[str, Reader] = {
    "coco": read_coco, "voc": read_voc, "cvat": read_cvat, "label-studio": read_label_studio, "csv-boxes": read_box_csv,
}  # fmt: skip
FORMATS = ("yolo", *_READERS, "imagefolder")


def read_labels(
    photos: Folder,
    labels: Folder,
    form: str,
    names: Path | Sequence[str] | str | None,
    style: str | None,
    progress: Progress,
) -> ReadFolder:
    """Labelled photos in the format `form`, one of FORMATS or auto. Raises UserError where it is not certain."""
    notes = []
    if form == "auto":
        form, example = recognise(photos, labels)
        notes = [f"format: {form} ({example})"]
    if form == "yolo":
        read = read_yolo(photos, labels, names, style, progress)
    elif form == "imagefolder":
        read = read_image_folder(photos, progress)
    else:
        read = _READERS[form](photos, labels, progress)
    read.notes = [*notes, *read.notes]
    return read


def recognise(photos: Folder, labels: Folder) -> tuple[str, str]:
    """(format, the file that shows it). Raises UserError for none, several, and an AI Hub tree."""
    found: dict[str, str] = {}
    for path in labels.paths():
        ending = path.lower().rpartition(".")[2]
        if CODES.fullmatch(path.rpartition("/")[0].rpartition("/")[2].removesuffix("_json")) and ending == "json":
            raise UserError(f"{labels.root}: these are photos of AI Hub: use `pillsnap manifest build --data-root`")
        kind = ""
        if ending == "json" and not {"coco", "label-studio"} <= set(found):
            document = read_json(labels, path)
            kind = "coco" if is_coco(document) else "label-studio" if is_label_studio(document) else ""
        elif ending == "xml" and not {"voc", "cvat"} & set(found):
            kind = {"annotation": "voc", "annotations": "cvat"}.get(root_tag(labels, path), "")
        elif ending == "csv" and box_columns(read_header(labels, path)):
            kind = "csv-boxes"
        if kind:
            found.setdefault(kind, path)
    labelled = has_labels(photos, labels)
    if labelled:
        found["yolo"] = labelled
    if len(found) > 1:
        raise UserError(f"{labels.root}: has labels as {' and as '.join(found)}: say which by --format")
    if found:
        return next(iter(found.items()))
    folders = {photo.rpartition("/")[0] for photo in photos.photos}
    classes = {folder.rpartition("/")[2] for folder in folders}
    if len(classes) > 1 and not any(_is_split_or_images(name) for name in classes):
        return "imagefolder", sorted(folders)[0]
    return "yolo", "no label file of any format"  # whose reader says what is missing


def _is_split_or_images(name: str) -> bool:
    from pillsnap.manifest.formats.splits import known_split

    return not name or bool(known_split(name)) or name.lower() in ("images", "labels", "jpegimages")
