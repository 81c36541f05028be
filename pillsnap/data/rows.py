"""Manifest rows of sampled AI Hub photos: labels are read in parallel and matched with the codes of the file name."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from pillsnap.data.aihub import Progress, split_codes
from pillsnap.data.archive_rows import archive_columns, label_jobs
from pillsnap.data.candidates import Candidates, Sample
from pillsnap.data.label_reading import LabelReader, read_all_labels
from pillsnap.data.labels import Label
from pillsnap.data.manifest import CAMERA_FIELDS, SCHEMA


@dataclass(frozen=True)
class Rows:
    """The manifest table, what the labels say about the codes, and label paths by problem."""

    table: pa.Table
    names: dict[str, str]
    edi_codes: dict[str, list[str]]
    num_labels: int
    problems: dict[str, list[str]]


def read_rows(
    candidates: Candidates,
    sample: Sample,
    data_root: Path,
    num_workers: int | None,
    label_reader: LabelReader,
    progress: Progress | None,
) -> Rows:
    """Rows sorted by sample id: the order must not depend on the folder or archive that a photo lies in.

    A pill whose label is missing, broken or of another code gets a null box and its label path is listed.
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

    names: dict[str, Counter[str]] = {}
    edi_codes: dict[str, set[str]] = {}
    problems: dict[str, list[str]] = {}
    for path, (_, code), label in zip(label_paths, jobs, labels, strict=True):
        if label.problem:
            problems.setdefault(label.problem, []).append(path)
        if label.name:
            names.setdefault(code, Counter())[label.name] += 1
        edi_codes.setdefault(code, set()).update(label.edi_codes)

    boxes, sizes = boxes_and_sizes(codes, labels)
    fields = scan.view_fields[scan.view_index[positions]]
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
    return Rows(
        table,
        {code: min(seen, key=lambda name: (-seen[name], name)) for code, seen in names.items()},
        {code: sorted(values) for code, values in edi_codes.items()},
        len(jobs),
        problems,
    )


def boxes_and_sizes(
    codes: Sequence[tuple[str, ...]], labels: Sequence[Label]
) -> tuple[list[list[tuple[float, float, float, float] | None]], list[tuple[int, int]]]:
    boxes, sizes = [], []
    cursor = 0
    for row in codes:
        found = labels[cursor : cursor + len(row)]
        cursor += len(row)
        boxes.append([label.box for label in found])
        said = Counter((label.width, label.height) for label in found if label.width and label.height)
        sizes.append(min(said, key=lambda size: (-said[size], size)) if said else (0, 0))
    return boxes, sizes
