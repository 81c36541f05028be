"""import_report.json: what an import found, and what it left out or found odd, each kind with its reason."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from pillsnap.files import write_json
from pillsnap.manifest.table import SPLITS

REPORT_NAME = "import_report.json"
_LISTED = 1000
_MAX_LEFT_OUT = 0.01
"""Share of photos or labels left out above which an import warns."""
MEANINGS = {
    "class_only_in_validation": "photos show a class without a training photo: left out",
    "annotation_without_image": "annotations name an image that the file does not list: left out",
    "classes_only_in_val": "classes occur in validation but not in training",
    "classes_without_photo": "classes have no photo in the manifest",
    "crowd": "annotations of crowds have no box of one pill: left out",
    "corrupt": "photos cannot be decoded: left out",
    "empty": "photos have no bytes: left out",
    "empty_label_file": "label files without a row: their photos are kept as background",
    "folder_seen_twice": "folders are links to a folder above, or to one seen before: left out",
    "folder_without_split": "photos in a folder that is neither train, val nor test, without labels: left out",
    "groups_in_val_and_test": "groups are in val and in test",
    "groups_on_both_sides": "groups are in train and in val",
    "label_of_two_photos": "photos of one name share a label file: left out",
    "label_spelled_differently": "labels were found under another spelling of the photo's name",
    "label_without_photo": "labels have no photo: left out",
    "link_or_not_a_file": "links and special files: left out; copy the file, or link the folder",
    "listed_photo_missing": "a list names photos that do not exist",
    "listed_split_missing": "data.yaml names a test split that does not exist",
    "mapping_code_not_in_file_name": "rows have a mapping_code that is not in the file name",
    "missing_photo": "photos do not exist under the data root",
    "no_label_file": "photos have no label: left out",
    "not_an_image": "files are no photos of a known format: left out",
    "other_file": "files are neither photos nor labels: left out",
    "other_size": "photos have another size than their label states, so boxes do not fit: left out",
    "outside_root": "photos are in a folder that leaves the data root: left out",
    "photo_not_listed": "photos are in no split of the data.yaml: left out",
    "photo_without_pills": "labels state no pill: their photos are kept as background",
    "pill_without_box": "pills have no box, or one without area: their photos do not train the detector",
    "repeated_row": "label rows repeat another: left out",
    "same_box_two_classes": "photos have one box under two classes",
    "shape_not_read": "shapes are neither boxes nor polygons: left out",
    "task_labelled_twice": "tasks have labels of several people and no ground truth: left out",
    "task_not_labelled": "tasks have no labels: left out",
    "too_large": "photos have too many bytes or pixels: left out",
    "truncated": "photos are cut off or of a kind that is not read: left out",
    "unreadable_name": "names have control characters or are not UTF-8: left out",
}


@dataclass
class Problems:
    """Files and rows that were left out or are odd, by kind."""

    by_kind: dict[str, list[str]] = field(default_factory=dict)
    _once: set[tuple[str, str]] = field(default_factory=set)

    def add(self, kind: str, what: str) -> None:
        """Note one file or row; bytes that are not UTF-8 are written as escapes."""
        self.by_kind.setdefault(kind, []).append(what.encode("utf-8", "backslashreplace").decode())

    def add_once(self, kind: str, what: str) -> None:
        """As `add`, unless it is noted already."""
        if (kind, what) not in self._once:
            self._once.add((kind, what))
            self.add(kind, what)


@dataclass
class Found:
    """What a source has before anything is left out."""

    photos: dict[str, str] = field(default_factory=dict)
    """Split by photo."""
    classes: set[str] = field(default_factory=set)
    """Codes that labels name."""


def large_losses(table: pa.Table, problems: Problems, found: Found) -> list[str]:
    """Warnings: more than 1 % of the photos or labels, or all of a split or class, were left out."""
    kept = set(table["image_path"].to_pylist())
    warnings = []
    lost = len(found.photos) - len(kept)
    if lost > _MAX_LEFT_OUT * len(found.photos):
        warnings.append(f"{lost:,} of {len(found.photos):,} photos are left out")
    orphans = len(problems.by_kind.get("label_without_photo", ()))
    if orphans > _MAX_LEFT_OUT * (len(kept) + orphans):
        warnings.append(f"{orphans:,} labels have no photo")
    for split in sorted(set(found.photos.values()) - {""}):
        if split not in table["split"].to_pylist():
            warnings.append(f"all photos of {split} are left out")
    lost_classes = sorted(found.classes - {code for codes in table["codes"].to_pylist() for code in codes})
    if lost_classes:
        more = ", …" if len(lost_classes) > 5 else ""
        warnings.append(f"all photos of {len(lost_classes)} classes are left out: {', '.join(lost_classes[:5])}{more}")
    return warnings


def write_report(
    out_dir: Path, table: pa.Table, problems: Problems, notes: Iterable[str] = (), warnings: Iterable[str] = ()
) -> None:
    """Write import_report.json of an imported table next to its manifest."""
    columns = ("split", "codes", "boxes")
    splits, codes, boxes = (table[name].to_pylist() for name in columns)
    found = {split: {"photos": 0, "pills": 0, "boxes": 0, "classes": 0} for split in SPLITS}
    classes: dict[str, set[str]] = {split: set() for split in SPLITS}
    for split, row_codes, row_boxes in zip(splits, codes, boxes, strict=True):
        counts = found[split]
        counts["photos"] += 1
        counts["pills"] += len(row_codes)
        counts["boxes"] += len(row_boxes) - row_boxes.count(None)
        classes[split].update(row_codes)
    for split in SPLITS:
        found[split]["classes"] = len(classes[split])
    report = {
        "schema_version": 1,
        "num_train": found["train"]["photos"],
        "num_val": found["val"]["photos"],
        "num_test": found["test"]["photos"],
        "num_groups": len(table["group"].unique()),
        "num_boxes": sum(counts["boxes"] for counts in found.values()),
        "background_photos": codes.count([]),
        "found": {split: counts for split, counts in found.items() if split != "test" or counts["photos"]},
        "notes": list(notes),
        "warnings": list(warnings),
        "problems": {
            kind: {"count": len(items), "meaning": MEANINGS.get(kind, ""), "listed": items[:_LISTED]}
            for kind, items in sorted(problems.by_kind.items())
        },
    }
    out_dir.mkdir(parents=True, exist_ok=True)
    write_json(out_dir / REPORT_NAME, report)


def report_lines(folder: Path) -> tuple[list[str], list[str]]:
    """(lines of text, warnings) of the report in `folder`: counts per split, then one line per kind of problem."""
    report: dict[str, Any] = json.loads((folder / REPORT_NAME).read_text(encoding="utf-8"))
    lines = list(report["notes"])
    lines += [
        f"{split}: {found['photos']:,} photos, {found['pills']:,} pills ({found['boxes']:,} with a box), "
        f"{found['classes']:,} classes"
        for split, found in report["found"].items()
    ]
    if report["problems"]:
        lines.append(f"left out or odd (listed in {folder / REPORT_NAME}):")
    for kind, problem in report["problems"].items():
        meaning = f" ({problem['meaning']})" if problem["meaning"] else ""
        lines.append(f"  {kind}: {problem['count']:,}, the first {problem['listed'][0]}{meaning}")
    return lines, list(report["warnings"])
