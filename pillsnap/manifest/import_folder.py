"""Imports a folder of labelled photos in the format of another tool into a manifest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from pillsnap.errors import UserError
from pillsnap.manifest.formats.folder import Folder
from pillsnap.manifest.formats.names import codes_of, read_names
from pillsnap.manifest.formats.photo import LabelledPhoto, ReadFolder, distinct_pills, group_namer
from pillsnap.manifest.formats.recognise import read_labels
from pillsnap.manifest.formats.splits import SPLIT_FOLDERS
from pillsnap.manifest.import_report import Found, Problems, large_losses, write_report
from pillsnap.manifest.selection.sampling import name_hashes
from pillsnap.manifest.selection.split import split_combinations
from pillsnap.manifest.table import SCHEMA, class_list, write_manifest
from pillsnap.observe.work_progress import Progress, unseen
from pillsnap.processes import without_garbage_collection


@dataclass(frozen=True)
class ImportOptions:
    """Options of an import. `names`: class names (formats/names.py). `labels`: style of YOLO rows (formats/yolo.py)."""

    names: Path | Sequence[str] | str | None = None
    labels: str | None = None
    group_by: str | None = None
    """Regular expression; its first group (or whole match) in the file name is the photo's group."""
    val_fraction: float | None = None
    """Share of the training photos that become validation photos, by groups; for sets without validation photos."""
    seed: int = 42
    form: str = "yolo"
    """Format of the labels: one of recognise.FORMATS, or auto."""
    photos: Path | None = None
    """Data root, where the photos are not in the folder of the labels."""
    strict: bool = False
    """Refuse an import that leaves out a lot (import_report.large_losses)."""


def import_folder(folder: Path, out_dir: Path, options: ImportOptions, progress: Progress = unseen) -> Path:
    """Turn a folder of labels and photos into a manifest; return the Parquet path. The data root is `folder`, unless
    the photos are elsewhere (`options.photos`).

    Boxes are converted to pixels of the upright photo. import_report.json lists what was left out, and why. Raises
    UserError for a missing folder, malformed or ambiguous labels, unknown splits, sets without training or validation
    photos, and groups in training and another split.
    """
    with without_garbage_collection():  # millions of rows have no cycles: two fifths of an import
        return _import(Path(folder), Path(out_dir), options, progress)


def _import(folder: Path, out_dir: Path, options: ImportOptions, progress: Progress) -> Path:
    problems = Problems()
    labels = Folder(folder, problems)
    source = labels if options.photos is None else Folder(options.photos, problems)
    read = read_labels(source, labels, options.form, options.names, options.labels, progress)
    photos = read.photos
    for path in labels.unused():
        problems.add("other_file", path)
    _check_names(read, options.names, labels.root)
    codes = codes_of(read.names)
    found = Found(dict.fromkeys(source.photos, "") | read.splits)
    found.classes = {codes[name] for photo in photos for name in photo.names}
    _check_labels(photos, problems)
    _group(photos, options)
    if not photos:
        raise UserError(_nothing_found(source, problems))
    _split(photos, options, source.root, read.splits)
    photos = _drop_unlearnable(photos, problems)
    _check_groups(photos, source.root, problems)
    for name in sorted(set(read.names) - {name for photo in photos for name in photo.names}):
        problems.add("classes_without_photo", name)
    photos.sort(key=lambda photo: photo.path.rpartition(".")[0])
    table = _table(photos, codes)
    warnings = large_losses(table, problems, found)
    write_report(out_dir, table, problems, read.notes, warnings)
    if warnings and options.strict:
        raise UserError(f"{folder}: {'; '.join(warnings)} (--strict). {out_dir / 'import_report.json'} lists them")
    classes = class_list(table, {code: name for name, code in codes.items()})
    return write_manifest(table, out_dir, classes)


def _check_names(read: ReadFolder, names: Path | Sequence[str] | str | None, root: Path) -> None:
    """Raise UserError for classes of the labels that are not in --names."""
    unknown = sorted({name for photo in read.photos for name in photo.names} - set(read_names(names))) if names else []
    if unknown:
        raise UserError(f"{root}: the labels have classes that --names has not: {', '.join(unknown[:5])}")


def _check_labels(photos: list[LabelledPhoto], problems: Problems) -> None:
    """Drop repeated rows; report boxes under two classes."""
    for photo in photos:
        if len(photo.names) < 2:
            continue
        pills, repeated, contradicts = distinct_pills(zip(photo.names, photo.boxes, strict=True))
        for _ in range(repeated):
            problems.add("repeated_row", photo.path)
        if contradicts:
            problems.add("same_box_two_classes", photo.path)
        photo.names, photo.boxes = [name for name, _ in pills], [box for _, box in pills]


def _group(photos: list[LabelledPhoto], options: ImportOptions) -> None:
    group_of = group_namer(options.group_by)
    for photo in photos:
        photo.group = photo.group or group_of(photo.path)


def _nothing_found(source: Folder, problems: Problems) -> str:
    if not source.photos:
        return f"{source.root}: no photos (.jpg, .png, .webp, …) in this folder or below"
    counts = {kind: len(items) for kind, items in problems.by_kind.items() if kind != "other_file"}
    reasons = ", ".join(f"{kind} {count:,}" for kind, count in sorted(counts.items(), key=lambda item: -item[1]))
    if set(counts) == {"no_label_file"}:
        return (
            f"{source.root}: {len(source.photos):,} photos, but no label file for any of them; expected labels/… in "
            "place of images/…, or a .txt beside each photo"
        )
    first = next(iter(problems.by_kind.values()))[0]
    return f"{source.root}: none of {len(source.photos):,} photos can be imported ({reasons}); the first: {first}"


def _split(photos: list[LabelledPhoto], options: ImportOptions, root: Path, of_all: dict[str, str]) -> None:
    """Choose validation photos where `val_fraction` is given. Raises UserError where a split stays unknown or empty."""
    counts = Counter(photo.split for photo in photos)
    fraction = options.val_fraction
    advice = "pass --val-fraction 0.2 to split by groups"
    if counts[""]:
        folders = sorted({photo.path.rpartition("/")[0] or "." for photo in photos})
        if fraction is None:
            known = ", ".join(name for names in SPLIT_FOLDERS.values() for name in names[:3])
            raise UserError(
                f"{root}: the split of {counts['']:,} photos is not known (folders: {', '.join(folders[:5])}); name "
                f"folders {known}, list them in a data.yaml, or {advice}"
            )
        for photo in photos:
            photo.split = photo.split or "train"
    elif fraction is not None and counts["val"]:
        raise UserError(f"{root}: has {counts['val']:,} validation photos: --val-fraction is for sets without any")
    if not any(photo.split == "train" and photo.names for photo in photos):
        raise UserError(f"{root}: no pill is labelled in a training split; name the training folder `train`")
    if counts["val"]:
        return
    lost = list(of_all.values()).count("val")
    if lost and fraction is None:
        raise UserError(
            f"{root}: all {lost:,} validation photos are left out, so there is none to validate with: label them"
        )
    if fraction is None:
        raise UserError(
            f"{root}: no validation photos, so training cannot choose its best model; add a folder `val` or {advice}"
        )
    chosen = _val_groups([photo for photo in photos if photo.split == "train"], fraction, options.seed)
    if not chosen:
        raise UserError(
            f"{root}: --val-fraction {fraction:g} leaves no validation photos: every group has a class that no other "
            "has, or there are too few groups"
        )
    for photo in photos:
        if photo.split == "train" and photo.group in chosen:
            photo.split = "val"


def _val_groups(photos: list[LabelledPhoto], fraction: float, seed: int) -> set[str]:
    sizes: Counter[str] = Counter(photo.group for photo in photos)
    shown: dict[str, set[str]] = {name: set() for name in sizes}
    for photo in photos:
        shown[photo.group].update(photo.names)
    names = sorted(sizes)
    order = [names[index] for index in name_hashes(names, seed, "split").argsort(kind="stable")]
    return split_combinations({name: (sizes[name], shown[name]) for name in order}, fraction, {})


def _drop_unlearnable(photos: list[LabelledPhoto], problems: Problems) -> list[LabelledPhoto]:
    learnable = {name for photo in photos if photo.split == "train" for name in photo.names}
    kept = []
    for photo in photos:
        if learnable.issuperset(photo.names):
            kept.append(photo)
        else:
            problems.add("class_only_in_validation", photo.path)
    return kept


def _check_groups(photos: list[LabelledPhoto], root: Path, problems: Problems) -> None:
    sides: dict[str, set[str]] = {}
    for photo in photos:
        sides.setdefault(photo.group, set()).add(photo.split)
    both = sorted(group for group, seen in sides.items() if len(seen) > 1 and "train" in seen)
    if both:
        others = sorted({side for group in both for side in sides[group]} - {"train"})
        raise UserError(
            f"{root}: {len(both)} groups are in train and in {' or '.join(others)} ({', '.join(both[:5])}…); move "
            "their photos to one split or change --group-by"
        )
    for group in sorted(group for group, seen in sides.items() if seen == {"val", "test"}):
        problems.add("groups_in_val_and_test", group)


def _table(photos: list[LabelledPhoto], codes: dict[str, str]) -> pa.Table:
    columns = {
        "sample_id": [photo.path.rpartition(".")[0] for photo in photos],
        "image_path": [photo.path for photo in photos],
        "image_type": ["combination" if len(photo.names) > 1 else "single" for photo in photos],
        "codes": [[codes[name] for name in photo.names] for photo in photos],
        "boxes": [photo.boxes for photo in photos],
        "width": [photo.width for photo in photos],
        "height": [photo.height for photo in photos],
        "group": [photo.group for photo in photos],
        "split": [photo.split for photo in photos],
        "source": [photo.source for photo in photos],
    }
    return pa.table(
        [pa.array(columns[name], of) if name in columns else pa.nulls(len(photos), of)
         for name, of in zip(SCHEMA.names, SCHEMA.types, strict=True)],
        schema=SCHEMA,
    )  # fmt: skip
