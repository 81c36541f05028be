"""Build a manifest from an AI Hub tree: scan -> sample -> split -> read the labels of what was sampled -> write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pillsnap.errors import UserError
from pillsnap.files import write_json
from pillsnap.manifest.label_reading import LabelReader
from pillsnap.manifest.rows import Rows, read_rows
from pillsnap.manifest.scan import scan as scan_tree
from pillsnap.manifest.selection.candidates import DEFAULT_GROUP_BY, Candidates
from pillsnap.manifest.selection.exact_duplicates import find_exact_duplicates
from pillsnap.manifest.selection.unknown_classes import choose_unknown, leave_out
from pillsnap.manifest.table import class_list, with_locations, write_manifest
from pillsnap.observe.work_progress import Progress, unseen
from pillsnap.photos.archives import join_command

REPORT_NAME = "sampling_report.json"
_LISTED = 1000
_MAX_DUPLICATES = 0.01
"""Share of duplicates across the split up to which they are left out; above, the manifest is written and unfit."""


@dataclass(frozen=True)
class BuildResult:
    """Path of the written Parquet and the sampling report (also in sampling_report.json next to it)."""

    path: Path
    report: dict


def build_manifest(
    data_root: Path,
    out_dir: Path,
    *,
    num_photos: int | None,
    num_classes: int | None,
    combination_fraction: float = 0.05,
    val_fraction: float = 0.185,
    seed: int = 42,
    min_photos_per_class: int = 2,
    group_by: Sequence[str] = DEFAULT_GROUP_BY,
    exclude: Path | None = None,
    num_workers: int | None = None,
    label_reader: LabelReader = "auto",
    check_copies: bool = True,
    unknown_classes: float = 0.0,
    progress: Progress = unseen,
) -> BuildResult:
    """Sample an AI Hub tree into a manifest in `out_dir`.

    Fractions are 0 to 1; a count of None takes all. `group_by`: fields of the file name that near-identical photos of
    one pill share; a group stays in one split. `exclude`: an earlier manifest; the groups of its validation photos are
    left out. `check_copies`: read every sampled photo, and leave out validation photos that are byte-identical to a
    training photo. `unknown_classes`: share of the classes that are left out of training. The
    output bytes depend only on the tree, the seed and the settings, not on `num_workers` (readers of labels and photos;
    None: all cores) or `label_reader` (label_reading.py). Raises UserError when nothing can be sampled.
    """
    scan = scan_tree(data_root, progress=progress)
    candidates = Candidates(scan, group_by)
    allowed = candidates.outside(exclude)
    sample = candidates.sample(
        allowed,
        num_photos=num_photos,
        num_classes=num_classes,
        combination_fraction=combination_fraction,
        val_fraction=val_fraction,
        min_photos_per_class=min_photos_per_class,
        seed=seed,
    )
    num_excluded = int((~allowed).sum())
    if not len(sample.photos):
        raise UserError(
            f"{data_root}: none of {len(scan)} photos is left after sampling: {len(sample.too_few_photos)} classes "
            f"have fewer than {min_photos_per_class} photos, {num_excluded} photos are excluded; relax the settings"
        )
    rows = read_rows(candidates, sample, Path(data_root), num_workers, label_reader, progress)
    duplicates = _val_duplicates(rows.table, Path(data_root), num_workers, progress) if check_copies else []
    dropped = duplicates if len(duplicates) <= _MAX_DUPLICATES * len(rows.table) else []
    sampled = _without(rows.table, dropped)
    unknown = choose_unknown(sampled, unknown_classes, seed)
    table = leave_out(sampled, unknown) if unknown else sampled
    classes = class_list(table, rows.facts.names, rows.facts.edi_codes, rows.facts.attributes)
    report: dict[str, Any] = {
        "schema_version": 1,
        "asked": {
            "num_photos": num_photos,
            "num_classes": num_classes,
            "combination_fraction": combination_fraction,
            "val_fraction": val_fraction,
            "min_photos_per_class": min_photos_per_class,
            "group_by": list(group_by),
            "seed": seed,
            "exclude": None if exclude is None else Path(exclude).name,
            "unknown_classes": unknown_classes,
        },
        "got": _got(table, len(classes)),
        "found": {
            "num_photos": len(scan),
            "num_classes": len(candidates.codes),
            "num_combinations": int(candidates.is_combination.sum()),
            "trees": sorted({scan.tree(index) for index in range(len(scan.folders))}),
            "num_archives": len(scan.label_archives),
        },
        "left_out": {
            "classes_with_too_few_photos": _listed(sample.too_few_photos),
            "photos_of_excluded_groups": num_excluded,
            "photos_without_a_training_class": sample.num_unlearnable,
            "unknown_classes": _listed(unknown),
            "photos_with_unknown_classes": len(sampled) - len(table),
            "validation_photos_equal_to_training_photos": _listed([name for _, name in dropped]),
            "photos_found_twice": {"count": len(scan) - len(candidates), "listed": candidates.found_twice(_LISTED)},
            "archives_in_pieces": scan.pieces,
            "refused": {
                reason: {"count": count, "listed": scan.refused.examples[reason]}
                for reason, count in sorted(scan.refused.counts.items())
            },
        },
        "labels": _labels(rows),
    }
    report["notes"] = _notes(report)
    if duplicates and not dropped:
        report["notes"].append(
            f"{len(duplicates)} validation photos are byte-identical to training photos: too many to leave out; "
            "`pillsnap manifest validate` will reject this manifest"
        )
    path = write_manifest(table, out_dir, classes, unknown)
    write_json(Path(out_dir) / REPORT_NAME, report)
    return BuildResult(path, report)


def _val_duplicates(
    table: pa.Table, data_root: Path, num_workers: int | None, progress: Progress
) -> list[tuple[int, str]]:
    """(row, image path) of validation photos that are byte-identical to a training photo."""
    locations = with_locations(table)["location"].to_pylist()
    paths, splits = table["image_path"].to_pylist(), table["split"].to_pylist()
    found = []
    for members in find_exact_duplicates(str(data_root), locations, num_workers, progress):
        if len({splits[row] for row in members}) > 1:
            found += [(row, paths[row]) for row in members if splits[row] == "val"]
    return sorted(found)


def _without(table: pa.Table, rows: list[tuple[int, str]]) -> pa.Table:
    kept = np.ones(len(table), dtype=bool)
    kept[[row for row, _ in rows]] = False
    return table.filter(pa.array(kept))


def _got(table: pa.Table, num_classes: int) -> dict:
    types, splits = table["image_type"].to_pylist(), table["split"].to_pylist()
    boxes = table["boxes"].to_pylist()
    num_val = splits.count("val")
    return {
        "num_photos": len(types),
        "num_classes": num_classes,
        "num_single": types.count("single"),
        "num_combination": types.count("combination"),
        "combination_fraction": round(types.count("combination") / len(types), 6),
        "num_train": len(types) - num_val,
        "num_val": num_val,
        "val_fraction": round(num_val / len(types), 6),
        "num_pills": sum(map(len, boxes)),
        "num_boxes": sum(box is not None for row in boxes for box in row),
        "photos_with_every_box": sum(None not in row for row in boxes),
    }


def _labels(rows: Rows) -> dict:
    return {
        "files": rows.num_labels,
        "boxes": sum(box is not None for boxes in rows.table["boxes"].to_pylist() for box in boxes),
        "problems": {problem: _listed(paths) for problem, paths in sorted(rows.problems.items())},
        "conflicting_attributes": _listed(rows.facts.conflicts),
    }


def _notes(report: dict) -> list[str]:
    asked, got = report["asked"], report["got"]
    notes = []
    for name in ("num_photos", "num_classes"):
        if asked[name] is not None and got[name] < asked[name]:
            notes.append(f"{name}: {asked[name]} requested, {got[name]} found")
    if asked["num_photos"] is not None:
        wanted = round(asked["num_photos"] * asked["combination_fraction"])
        if got["num_combination"] != wanted:
            notes.append(f"combination photos: {wanted} requested, {got['num_combination']} taken")
    if got["num_boxes"] < got["num_pills"]:
        notes.append(f"{got['num_pills'] - got['num_boxes']} of {got['num_pills']} pills have no box")
    for problem, found in report["labels"]["problems"].items():
        notes.append(f"labels with problem {problem}: {found['count']:,}, the first {found['listed'][0]}")
    conflicts = report["labels"]["conflicting_attributes"]
    if conflicts["count"]:
        notes.append(f"attributes on which labels disagree: {conflicts['count']:,}, the first {conflicts['listed'][0]}")
    for reason, found in report["left_out"]["refused"].items():
        notes.append(f"files left out, {reason}: {found['count']:,}, the first {found['listed'][0]}")
    if report["left_out"]["photos_found_twice"]["count"]:
        twice = report["left_out"]["photos_found_twice"]
        notes.append(f"photos found twice and taken once: {twice['count']:,}, the first {twice['listed'][0]}")
    for archive, count in report["left_out"]["archives_in_pieces"].items():
        command = join_command(archive.rpartition("/")[2])
        notes.append(f"not read, still in {count} pieces: {archive}; join them, in its folder: {command}")
    if unknown := report["left_out"]["unknown_classes"]["count"]:
        notes.append(
            f"classes left out of training, whose photos of one pill are validated as unknown: {unknown:,}; photos "
            f"that show them beside others, left out: {report['left_out']['photos_with_unknown_classes']:,}"
        )
    if got["num_val"] == 0:
        notes.append("no validation photos: every class has only one group")
    return notes


def _listed(items: Sequence[str]) -> dict:
    return {"count": len(items), "listed": list(items[:_LISTED])}
