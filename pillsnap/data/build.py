"""Build a manifest from an AI Hub tree: scan -> sample -> split -> read the labels of what was sampled -> write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from pillsnap.data.aihub import Progress
from pillsnap.data.candidates import DEFAULT_GROUP_BY, Candidates
from pillsnap.data.label_reading import LabelReader
from pillsnap.data.manifest import class_list, write_json, write_manifest
from pillsnap.data.rows import Rows, read_rows
from pillsnap.data.scan import scan as scan_tree
from pillsnap.errors import UserError

REPORT_NAME = "sampling_report.json"
_LISTED = 1000


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
    progress: Progress | None = None,
) -> BuildResult:
    """Sample an AI Hub tree into a manifest beneath `out_dir`.

    Fractions are 0 to 1; None for a count takes all there are. `group_by`: fields of the file name that near-twins of
    one pill share: they stay on one side. `exclude` names an earlier manifest whose validation photos and their
    near-twins are left out. The output depends on the tree, the seed and the settings alone, byte for byte; not on
    `num_workers` (readers of labels; None = all cores) nor on `label_reader` (see label_reading.py). Raises UserError
    when nothing can be sampled.
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
            f"have fewer than {min_photos_per_class} photos, {num_excluded} photos are excluded; loosen the settings"
        )
    rows = read_rows(candidates, sample, Path(data_root), num_workers, label_reader, progress)
    classes = class_list(rows.table, rows.names, rows.edi_codes)
    report = {
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
        },
        "got": _got(rows.table, len(classes)),
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
            "photos_found_twice": {"count": len(scan) - len(candidates), "listed": candidates.found_twice(_LISTED)},
            "refused": {
                reason: {"count": count, "listed": scan.refused.examples[reason]}
                for reason, count in sorted(scan.refused.counts.items())
            },
        },
        "labels": _labels(rows),
    }
    report["notes"] = _notes(report)
    path = write_manifest(rows.table, out_dir, classes)
    write_json(Path(out_dir) / REPORT_NAME, report)
    return BuildResult(path, report)


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
        "boxes": rows.num_labels - sum(map(len, rows.problems.values())),
        "problems": {problem: _listed(paths) for problem, paths in sorted(rows.problems.items())},
    }


def _notes(report: dict) -> list[str]:
    asked, got = report["asked"], report["got"]
    notes = []
    for name in ("num_photos", "num_classes"):
        if asked[name] is not None and got[name] < asked[name]:
            notes.append(f"{name}: asked for {asked[name]}, the tree had enough for {got[name]}")
    if asked["num_photos"] is not None:
        wanted = round(asked["num_photos"] * asked["combination_fraction"])
        if got["num_combination"] != wanted:
            notes.append(f"combination photos: asked for {wanted}, took {got['num_combination']}")
    if got["num_boxes"] < got["num_pills"]:
        notes.append(f"{got['num_pills'] - got['num_boxes']} of {got['num_pills']} pills have no box")
    if got["num_val"] == 0:
        notes.append("no validation photos: every class has a single group")
    return notes


def _listed(items: Sequence[str]) -> dict:
    return {"count": len(items), "listed": list(items[:_LISTED])}
