"""CSV files with one row per pill and columns for its box, and folders named by classes (ImageFolder)."""

from __future__ import annotations

import csv
import io

from pillsnap.errors import UserError
from pillsnap.manifest.formats.folder import Folder
from pillsnap.manifest.formats.photo import LabelledPhoto, ReadFolder
from pillsnap.manifest.formats.reading import read_photos
from pillsnap.manifest.formats.records import Record, attach, number, pixel_box, whole
from pillsnap.manifest.formats.splits import known_split, splits_by_folder
from pillsnap.observe.work_progress import Progress, unseen

_PHOTO = ("filename", "file_name", "image_path", "image", "path", "photo")
_CLASS = ("class", "label", "class_name", "name", "category", "mapping_code")
_EDGES = (("xmin", "ymin", "xmax", "ymax"), ("x1", "y1", "x2", "y2"), ("left", "top", "right", "bottom"))
_SIZES = (("x", "y", "w", "h"), ("bbox_x", "bbox_y", "bbox_width", "bbox_height"))


def box_columns(header: list[str]) -> tuple[str, ...]:
    """The columns of `header` (in small letters) that hold a box; empty if there are none."""
    return next((columns for columns in (*_EDGES, *_SIZES) if set(columns) <= set(header)), ())


def read_header(folder: Folder, path: str) -> list[str]:
    """Column names of a CSV file, in small letters."""
    with (folder.root / path).open(encoding="utf-8-sig", errors="replace", newline="") as file:
        return [cell.strip().lower() for cell in next(csv.reader(file), [])]


def read_box_csv(photos: Folder, labels: Folder, progress: Progress = unseen) -> ReadFolder:
    """Labelled photos of all CSV files of `labels` that have columns for a photo, a class and a box.

    Boxes are edges (xmin, ymin, xmax, ymax) or corner and size (x, y, w, h), in pixels.
    """
    records: dict[str, Record] = {}
    for path in labels.paths():
        if path.lower().endswith(".csv") and box_columns(read_header(labels, path)):
            labels.use(path)
            _read(path, (labels.root / path).read_bytes(), records)
    if not records:
        raise UserError(f"{labels.root}: no .csv file with columns for a box ({', '.join(_EDGES[0])} or x, y, w, h)")
    names = sorted({name for record in records.values() for name, _ in record.pills})
    return attach(photos, list(records.values()), names, "csv", progress)


def _read(path: str, data: bytes, records: dict[str, Record]) -> None:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text; save the file as UTF-8") from error
    rows = list(csv.reader(io.StringIO(text, newline="")))
    header = [cell.strip().lower() for cell in rows[0]]
    photo, name = (next((one for one in known if one in header), "") for known in (_PHOTO, _CLASS))
    if not photo or not name:
        raise UserError(f"{path}: row 1: no column for the photo ({', '.join(_PHOTO)}) or class ({', '.join(_CLASS)})")
    columns = box_columns(header)
    smallest = []
    for line, cells in enumerate(rows[1:], start=2):
        where = f"{path}: row {line}"
        if not cells:
            continue
        if len(cells) != len(header):
            raise UserError(f"{where}: {len(cells)} cells, but the header has {len(header)}")
        row = dict(zip(header, (cell.strip() for cell in cells), strict=True))
        record = records.setdefault(row[photo], Record([row[photo]], path))
        split = known_split(row.get("split", ""))
        if row.get("split") and not split:
            raise UserError(f"{where}: neither train, val nor test: the column `split` says {row['split']!r}")
        record.split = split or record.split
        if columns in _EDGES:  # `width` and `height` are those of the photo
            record.width, record.height = whole(row.get("width")), whole(row.get("height"))
        if not row[name] and not any(row[column] for column in columns):
            continue  # a photo without a pill
        a, b, c, d = (number(row[column], where) for column in columns)
        smallest.append(max(a, b, c, d))
        box = pixel_box(a, b, *((c - a, d - b) if columns in _EDGES else (c, d)), where)
        record.pills.append((row[name], box))
    if smallest and max(smallest) <= 1:
        raise UserError(f"{path}: all boxes are within 0..1: they seem to be normalised, but pixels are expected")


def read_image_folder(photos: Folder, progress: Progress = unseen) -> ReadFolder:
    """Photos of one pill each, in folders named by classes: [<split>/]<class>/photo. The box is the whole photo."""
    splits = {photo: split for photo, (split, _) in splits_by_folder(photos.photos)[0].items()}
    labelled = []
    reads = read_photos(photos.root, [(photo, "") for photo in photos.photos], progress)
    for photo, read in zip(photos.photos, reads, strict=True):
        name = photo.rpartition("/")[0].rpartition("/")[2]
        if not name or known_split(name):
            raise UserError(f"{photos.root}: {photo} is in no folder named by a class")
        if read.problem:
            photos.problems.add(read.problem, photo)
            continue
        box = (0.0, 0.0, float(read.width), float(read.height))
        split = splits.get(photo, "")
        labelled.append(LabelledPhoto(photo, read.width, read.height, [name], [box], split, "imagefolder"))
    names = sorted({photo.rpartition("/")[0].rpartition("/")[2] for photo in photos.photos})
    note = "for classification alone: the box is the whole photo; train with --task classification"
    return ReadFolder(labelled, names, {photo: splits.get(photo, "") for photo in photos.photos}, [note])
