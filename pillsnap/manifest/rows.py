"""Manifest rows of sampled AI Hub photos: labels matched with the codes of the file name, archive members located."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pyarrow as pa

from pillsnap.manifest.aihub import label_folder, label_names, label_paths, parse_name, split_codes
from pillsnap.manifest.class_facts import ClassFacts, class_facts
from pillsnap.manifest.label_reading import LabelReader, read_all_labels
from pillsnap.manifest.labels import Label
from pillsnap.manifest.scan import Scan
from pillsnap.manifest.selection.candidates import Candidates, Sample
from pillsnap.manifest.table import CAMERA_FIELDS, SCHEMA
from pillsnap.observe.work_progress import Progress
from pillsnap.photos.archives import Member, locate, read_directory, to_location


@dataclass(frozen=True)
class Rows:
    """The manifest table, facts about its classes, and label paths by problem."""

    table: pa.Table
    facts: ClassFacts
    num_labels: int
    problems: dict[str, list[str]]


def read_rows(
    candidates: Candidates,
    sample: Sample,
    data_root: Path,
    num_workers: int | None,
    label_reader: LabelReader,
    progress: Progress,
) -> Rows:
    """Rows sorted by sample id, so that the order does not depend on folders and archives.

    A pill whose label is missing, broken or of another code has a null box, and its label path is listed; so is that of
    a label that states another side than the file name, whose side counts.
    """
    scan = candidates.scan
    positions = candidates.positions[sample.photos].tolist()
    stems = [scan.stem(position) for position in positions]
    order = sorted(range(len(stems)), key=stems.__getitem__)
    stems = [stems[row] for row in order]
    positions = [positions[row] for row in order]
    photos = sample.photos[order].tolist()
    sets = scan.set_index[positions].tolist()
    codes = [split_codes(scan.prefixes[index]) for index in sets]
    label_paths, jobs = label_jobs(scan, positions, os.fspath(data_root))
    labels = read_all_labels(data_root, jobs, num_workers, progress, label_reader)
    owners = [stem for stem, row in zip(stems, codes, strict=True) for _ in row]
    labels = [of_photo(label, stem) for label, stem in zip(labels, owners, strict=True)]

    fields = scan.view_fields[scan.view_index[positions]]
    directions = fields[:, CAMERA_FIELDS.index("direction")].tolist()
    named = [direction for direction, row in zip(directions, codes, strict=True) for _ in row]
    problems: dict[str, list[str]] = {}
    for path, direction, label in zip(label_paths, named, labels, strict=True):
        if label.problem:
            problems.setdefault(label.problem, []).append(path)
        if label.direction not in (None, direction):
            problems.setdefault("other_side", []).append(path)

    boxes, sizes = boxes_and_sizes(codes, labels)
    for stem, row in zip(stems, boxes, strict=True):
        known = [box for box in row if box is not None]
        if len(set(known)) < len(known):
            problems.setdefault("same_box", []).append(stem)
    columns = {
        "sample_id": stems,
        "image_path": [scan.path(position) for position in positions],
        "image_type": ["combination" if len(row) > 1 else "single" for row in codes],
        "codes": codes,
        "boxes": boxes,
        "width": [width for width, _ in sizes],
        "height": [height for _, height in sizes],
        "group": [candidates.group_name(photo) for photo in photos],
        "split": ["val" if is_val else "train" for is_val in sample.is_val[order]],
        "source": ["aihub/" + scan.tree(index) for index in sets],
        **{name: fields[:, column] for column, name in enumerate(CAMERA_FIELDS)},
        **archive_columns(scan, positions, os.fspath(data_root)),
    }
    table = pa.table({name: pa.array(values, type=SCHEMA.field(name).type) for name, values in columns.items()})
    return Rows(table, class_facts([code for _, code in jobs], labels), len(jobs), problems)


def of_photo(label: Label, stem: str) -> Label:
    """The label, or one without a box if its `file_name` is the AI Hub name of another photo."""
    named = label.file_name.rpartition("/")[2]
    if label.box is None or named.partition(".")[0] == stem or parse_name(named) is None:
        return label
    return label._replace(problem="other_photo", box=None)


def boxes_and_sizes(
    codes: Sequence[tuple[str, ...]], labels: Sequence[Label]
) -> tuple[list[list[tuple[float, float, float, float] | None]], list[tuple[int, int]]]:
    """(boxes, (width, height)) per photo, from the labels of its `codes` in order; the size most labels state."""
    boxes, sizes = [], []
    cursor = 0
    for row in codes:
        found = labels[cursor : cursor + len(row)]
        cursor += len(row)
        boxes.append([label.box for label in found])
        stated = Counter((label.width, label.height) for label in found if label.width and label.height)
        sizes.append(min(stated, key=lambda size: (-stated[size], size)) if stated else (0, 0))
    return boxes, sizes


def archive_columns(scan: Scan, positions: list[int], root: str) -> dict[str, list]:
    """The columns archive, member, offset, length and compression of photos; {} when no photo is in an archive."""
    if scan.members is None:
        return {}
    names = ("archive", "member", "offset", "length", "compression")
    columns: dict[str, list] = {name: [None] * len(positions) for name in names}
    by_archive: dict[str, list[tuple[int, Member]]] = {}
    for row, position in enumerate(positions):
        member = scan.member(position)
        if member is not None:
            archive = scan.archive_of_set[scan.set_index[position]]
            by_archive.setdefault(str(archive), []).append((row, member))
    for archive, entries in by_archive.items():
        places = locate(root, archive, [member for _, member in entries])
        for (row, member), place in zip(entries, places, strict=True):
            values = (archive, member.name[len(archive) + 1 :], place.offset, place.length, place.compression)
            for name, value in zip(names, values, strict=True):
                columns[name][row] = value
    return columns


def label_jobs(scan: Scan, positions: list[int], root: str) -> tuple[list[str], list[tuple[str, str]]]:
    """(label paths for people, (location, code) jobs) of photos, one per code; an empty location is a missing label."""
    paths: list[str] = []
    jobs: list[tuple[str, str]] = []
    zipped: dict[str, dict[str, list[int]]] = {}
    for position in positions:
        index = scan.set_index[position]
        prefix, stem = scan.prefixes[index], scan.stem(position)
        archive = scan.archive_of_set[index]
        codes = split_codes(prefix)
        if scan.is_delivered(index):
            found = scan.delivery.label_jobs(scan.folders[index], prefix, stem)
            jobs += zip(found, codes, strict=True)
        elif archive is None:
            found = label_paths(scan.folders[index], prefix, stem)
            if not scan.folders[index].isascii():
                base = label_folder(scan.folders[index])
                found = [_as_on_disk(root, base) + path[len(base) :] for path in found]
            jobs += zip(found, codes, strict=True)
        else:
            label_archive = scan.label_archives[archive]
            leaf = scan.folders[index].rpartition("/")[2]
            names = [f"{leaf}_json/{name}" for name in label_names(prefix, stem)]
            found = [f"{label_archive or archive}/{name}" for name in names]
            for name, code in zip(names, codes, strict=True):
                if label_archive is not None:
                    zipped.setdefault(label_archive, {}).setdefault(_tail(name), []).append(len(jobs))
                jobs.append(("", code))
        paths += found
    for label_archive, wanted in zipped.items():
        members = [entry for entry in read_directory(Path(root, label_archive)) if _tail(entry.name) in wanted]
        for member, place in zip(members, locate(root, label_archive, members), strict=True):
            if not member.problem:
                for job in wanted[_tail(member.name)]:
                    jobs[job] = (to_location(place), jobs[job][1])
    return paths, jobs


@lru_cache(maxsize=4096)
def _as_on_disk(root: str, folder: str) -> str:
    """The folder in the Unicode form that exists: images and labels may have been unpacked on different systems."""
    forms = (folder, unicodedata.normalize("NFC", folder), unicodedata.normalize("NFD", folder))
    return next((form for form in forms if os.path.isdir(f"{root}/{form}")), folder)


def _tail(name: str) -> str:
    """Folder and name; archives differ in the folders above."""
    return "/".join(name.rsplit("/", 2)[-2:])
