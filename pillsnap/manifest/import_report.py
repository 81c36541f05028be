"""import_report.json: what an import found, and what it left out or found odd."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from pillsnap.files import write_json

REPORT_NAME = "import_report.json"
_LISTED = 1000


@dataclass
class Problems:
    """Files and rows that were left out or are odd, by kind."""

    by_kind: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, what: str) -> None:
        """Note one file or row; bytes that are not UTF-8 are written as escapes."""
        self.by_kind.setdefault(kind, []).append(what.encode("utf-8", "backslashreplace").decode())


def write_report(out_dir: Path, table: pa.Table, problems: Problems) -> None:
    """Write import_report.json of an imported table next to its manifest."""
    splits = table["split"].to_pylist()
    report = {
        "schema_version": 1,
        "num_train": splits.count("train"),
        "num_val": splits.count("val"),
        "num_groups": len(set(table["group"].to_pylist())),
        "num_boxes": sum(box is not None for boxes in table["boxes"].to_pylist() for box in boxes),
        "background_photos": sum(not codes for codes in table["codes"].to_pylist()),
        "found": {split: _counts(table, split) for split in ("train", "val")},
        "problems": {
            kind: {"count": len(items), "listed": items[:_LISTED]} for kind, items in sorted(problems.by_kind.items())
        },
    }
    write_json(out_dir / REPORT_NAME, report)


def _counts(table: pa.Table, split: str) -> dict[str, int]:
    rows = zip(table["codes"].to_pylist(), table["boxes"].to_pylist(), table["split"].to_pylist(), strict=True)
    photos = [(codes, boxes) for codes, boxes, of_split in rows if of_split == split]
    return {
        "photos": len(photos),
        "pills": sum(len(codes) for codes, _ in photos),
        "boxes": sum(box is not None for _, boxes in photos for box in boxes),
        "classes": len({code for codes, _ in photos for code in codes}),
    }


def report_lines(folder: Path) -> list[str]:
    """The report in `folder` as lines of text: counts per split, then one line per kind of problem."""
    report: dict[str, Any] = json.loads((folder / REPORT_NAME).read_text(encoding="utf-8"))
    lines = [
        f"{split}: {found['photos']:,} photos, {found['pills']:,} pills ({found['boxes']:,} with a box), "
        f"{found['classes']:,} classes"
        for split, found in report["found"].items()
    ]
    if report["problems"]:
        lines.append(f"left out or odd (listed in {folder / REPORT_NAME}):")
    for kind, problem in report["problems"].items():
        lines.append(f"  {kind}: {problem['count']:,}, the first {problem['listed'][0]}")
    return lines
