"""The audit of a manifest: its rows, its photo files and duplicates across the split. Read-only."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from pillsnap.errors import UserError
from pillsnap.manifest.audit.files import Inspection, inspect_photos
from pillsnap.manifest.audit.near_duplicates import find_near_duplicates
from pillsnap.manifest.audit.report import AuditReport, Finding, finding
from pillsnap.manifest.audit.rows import check_boxes, check_rows, read_columns
from pillsnap.manifest.selection.exact_duplicates import confirm_duplicates, group_equal
from pillsnap.manifest.table import CLASSES_NAME, manifest_hash, read_classes, read_manifest, read_unknown
from pillsnap.observe.work_progress import Progress, unseen
from pillsnap.photos.decode import DEFAULT_MAX_PIXELS
from pillsnap.storage import is_uri

_CHUNK = {False: 500, True: 16}
_PROCESSES_FROM = {False: 20_000, True: 64}
"""Number of photos from which worker processes are faster despite their start."""
_MEANING = {
    "outside_root": "paths leave the data root",
    "missing": "photos do not exist; check --data-root",
    "link": "photos are links: copy the file, or link the folder",
    "not_a_file": "paths are not regular files",
    "unreadable_file": "photos cannot be read",
    "too_large": "photos have too many bytes or pixels",
    "empty": "photos have no bytes",
    "not_an_image": "files are no photos of a known format",
    "truncated": "photos are cut off or of a kind that is not read",
    "corrupt": "photos cannot be decoded",
}


def audit(
    manifest_path: Path,
    data_root: str | Path,
    *,
    deep: bool = False,
    num_workers: int | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    progress: Progress = unseen,
) -> AuditReport:
    """Check a manifest and its photos under `data_root`, a folder or a URI; nothing is written.

    Without `deep`, the header and end mark of each file are read; with it, every photo is decoded and compared across
    the split. `num_workers`: processes (None: all cores). Raises UserError for an unreadable manifest or data root.
    """
    table = read_manifest(manifest_path)
    root = str(data_root)
    if not is_uri(root) and not Path(root).is_dir():
        raise UserError(f"{data_root}: the data root is not a folder; set --data-root or PILLSNAP_DATA_ROOT")
    class_file = (Path(manifest_path) if Path(manifest_path).is_dir() else Path(manifest_path).parent) / CLASSES_NAME
    classes = read_classes(class_file) if class_file.is_file() else None
    unknown = [] if classes is None else read_unknown(class_file)
    columns = read_columns(table)
    columns["location"] = table["location"].to_pylist()
    if not table.num_rows:
        found = list(finding("no_photos", "error", "the manifest is empty", [str(manifest_path)]))
    else:
        inspections = _inspect_all(root, columns, deep, num_workers, max_pixels, progress)
        found = [*check_rows(columns, classes, unknown), *_check_files(columns, inspections), *check_boxes(columns)]
        found += _check_duplicates(root, columns, inspections, deep)
        if deep:
            found += _check_near_duplicates(columns, inspections)
    codes = {code for row in columns["codes"] for code in row}
    return AuditReport(
        manifest=str(manifest_path),
        manifest_hash=manifest_hash(manifest_path),
        deep=deep,
        num_photos=table.num_rows,
        num_train=columns["split"].count("train"),
        num_val=columns["split"].count("val"),
        num_classes=len(codes),
        findings=sorted(found, key=lambda one: one.severity),
    )


def _inspect_all(
    root: str,
    columns: dict[str, list],
    deep: bool,
    num_workers: int | None,
    max_pixels: int,
    progress: Progress,
) -> list[Inspection]:
    jobs = list(zip(columns["location"], columns["boxes"], strict=True))
    size = _CHUNK[deep]
    chunks = [jobs[start : start + size] for start in range(0, len(jobs), size)]
    workers = num_workers or os.cpu_count() or 1
    found: list[Inspection] = []

    def collect(parts: Iterator[list[Inspection]]) -> None:
        for part in parts:
            found.extend(part)
            progress("photos", len(found), len(jobs))

    if workers == 1 or len(jobs) < _PROCESSES_FROM[deep]:
        collect(inspect_photos(root, chunk, deep, max_pixels) for chunk in chunks)
        return found
    count = len(chunks)
    with ProcessPoolExecutor(workers, mp_context=get_context("forkserver")) as pool:
        collect(pool.map(inspect_photos, [root] * count, chunks, [deep] * count, [max_pixels] * count))
    return found


def _check_files(columns: dict[str, list], inspections: list[Inspection]) -> Iterator[Finding]:
    """Findings about files. Sizes that are unknown in the manifest are taken from the headers."""
    by_problem: dict[str, list[str]] = defaultdict(list)
    other_size = []
    for i, (path, seen) in enumerate(zip(columns["image_path"], inspections, strict=True)):
        if seen.problem:
            by_problem[seen.problem].append(f"{path} ({seen.detail})" if seen.detail else path)
        elif not columns["width"][i] or not columns["height"][i]:
            columns["width"][i], columns["height"][i] = seen.width, seen.height
        elif (seen.width, seen.height) != (columns["width"][i], columns["height"][i]):
            other_size.append(f"{path} ({seen.width} x {seen.height})")
    for problem, message in _MEANING.items():
        yield from finding(problem, "error", message, by_problem.get(problem, []))
    yield from finding(
        "other_size", "error", "the size of photos differs from the manifest: boxes are wrong", other_size
    )


def _check_duplicates(
    root: str, columns: dict[str, list], inspections: list[Inspection], deep: bool
) -> Iterator[Finding]:
    fingerprints = [seen.fingerprint for seen in inspections]
    # Fingerprints of a deep inspection are hashes of whole photos.
    groups = group_equal(fingerprints) if deep else confirm_duplicates(root, columns["location"], fingerprints)
    leaks, contradictions, repeats = [], [], []
    for members in groups:
        names = " = ".join(sorted({columns["image_path"][i] for i in members})[:5])
        splits = {columns["split"][i] for i in members}
        if len(splits) > 1 and "train" in splits:
            leaks.append(names)
        elif len({tuple(columns["codes"][i]) for i in members}) > 1:
            contradictions.append(names)
        else:
            repeats.append(names)
    yield from finding("duplicate_across_split", "error", "byte-identical photos are in train and another split", leaks)
    yield from finding("duplicate_other_codes", "error", "byte-identical photos have different codes", contradictions)
    yield from finding("duplicate_content", "warning", "photos are byte-identical", repeats)


def _check_near_duplicates(columns: dict[str, list], inspections: list[Inspection]) -> Iterator[Finding]:
    held_out = np.array([split != "train" for split in columns["split"]])
    pairs = find_near_duplicates(
        [seen.frame_hash for seen in inspections], [seen.thumbnail for seen in inspections], held_out
    )
    listed = [
        f"{columns['image_path'][a]} ~ {columns['image_path'][b]}"
        for a, b in pairs
        if inspections[a].fingerprint != inspections[b].fingerprint
    ]
    yield from finding("near_duplicate", "warning", "photos in train look like photos in val or test", listed)
