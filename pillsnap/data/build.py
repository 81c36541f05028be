"""Build a manifest from an AI Hub tree: scan -> sample -> split -> read the labels of what was sampled -> write."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa

from pillsnap.data import aihub, sampling, split
from pillsnap.data.aihub import Progress, Scan
from pillsnap.data.labels import Label, read_labels
from pillsnap.data.manifest import CAMERA_FIELDS, SCHEMA, class_list, read_manifest, write_json, write_manifest
from pillsnap.errors import UserError

REPORT_NAME = "sampling_report.json"
_LISTED = 1000
_CHUNK = 500
_PROCESSES_FROM = 4000
"""Label files from which worker processes pay for their start (about 0.3 s)."""


@dataclass(frozen=True)
class BuildResult:
    """Path of the written Parquet and the sampling report (also in sampling_report.json next to it)."""

    path: Path
    report: dict


@dataclass
class _Candidates:
    """The scan, with one entry per distinct photo and everything that sampling and splitting look at."""

    scan: Scan
    prefix_names: list[str]
    prefix_of_set: np.ndarray
    codes: list[str]
    prefix_codes: list[np.ndarray]
    photos: np.ndarray
    prefix: np.ndarray
    view: np.ndarray
    group: np.ndarray
    group_of_view: np.ndarray
    view_groups: list[str]
    num_duplicates: int
    duplicate_examples: list[str] = field(default_factory=list)

    def group_name(self, prefix: int, view: int) -> str:
        """`K-000114_1_260` (side 1, longitude 260) for one pill, `K-A-B` for a combination."""
        if len(self.prefix_codes[prefix]) > 1:
            return self.prefix_names[prefix]
        return self.prefix_names[prefix] + self.view_groups[self.group_of_view[view]]


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
    exclude: Path | None = None,
    num_workers: int | None = None,
    progress: Progress | None = None,
) -> BuildResult:
    """Sample an AI Hub tree into a manifest beneath `out_dir`.

    Fractions are 0 to 1; None for a count takes all there are. `exclude` names an earlier manifest whose validation
    groups are left out. The output depends on the tree, the seed and the settings alone, byte for byte; not on
    `num_workers` (processes that read labels; None = all cores). Raises UserError when nothing can be sampled.
    """
    scan = aihub.scan(data_root, progress=progress)
    candidates = _candidates(scan)
    allowed, num_excluded = _not_excluded(candidates, exclude)
    chosen, small_classes = _choose(
        candidates, allowed, num_photos, num_classes, combination_fraction, min_photos_per_class, seed
    )
    if not len(chosen.photos):
        raise UserError(
            f"{data_root}: {len(scan)} photos, but none is left after sampling ({len(small_classes)} classes have "
            f"fewer than {min_photos_per_class} photos, {num_excluded} photos excluded); loosen the sampling settings"
        )
    is_val, unlearnable = _split(candidates, chosen.photos, val_fraction, seed)
    photos = chosen.photos[~unlearnable]
    table, names, edi_codes, label_report = _read_rows(
        candidates, photos, is_val[~unlearnable], Path(data_root), num_workers, progress
    )
    classes = class_list(table, names, edi_codes)
    report = {
        "schema_version": 1,
        "asked": {
            "num_photos": num_photos,
            "num_classes": num_classes,
            "combination_fraction": combination_fraction,
            "val_fraction": val_fraction,
            "min_photos_per_class": min_photos_per_class,
            "seed": seed,
            "exclude": None if exclude is None else Path(exclude).name,
        },
        "got": _got(table, len(classes)),
        "found": {
            "num_photos": len(scan),
            "num_classes": len(candidates.codes),
            "num_combinations": sum(len(codes) > 1 for codes in candidates.prefix_codes),
            "trees": sorted({folder.split("/images/")[0] for folder in scan.folders}),
        },
        "left_out": {
            "classes_with_too_few_photos": _listed(small_classes),
            "photos_of_excluded_groups": num_excluded,
            "photos_without_a_training_class": int(unlearnable.sum()),
            "photos_found_twice": {"count": candidates.num_duplicates, "examples": candidates.duplicate_examples},
            "refused": {
                reason: {"count": count, "examples": scan.refused.examples[reason]}
                for reason, count in sorted(scan.refused.counts.items())
            },
        },
        "labels": label_report,
    }
    report["notes"] = _notes(report)
    path = write_manifest(table, out_dir, classes)
    write_json(Path(out_dir) / REPORT_NAME, report)
    return BuildResult(path, report)


def _candidates(scan: Scan) -> _Candidates:
    prefix_names, prefix_of_set = np.unique(np.array(scan.prefixes), return_inverse=True)
    names = [str(name) for name in prefix_names]
    split_names = [aihub.split_codes(name) for name in names]
    codes = sorted({code for parts in split_names for code in parts})
    code_id = {code: i for i, code in enumerate(codes)}
    prefix_codes = [np.array([code_id[code] for code in parts]) for parts in split_names]
    # Two extensions of one stem are one view: the same photo saved twice.
    stems = [view.rpartition(".")[0] for view in scan.views]
    stem_id = {stem: i for i, stem in enumerate(sorted(set(stems)))}
    stem_of_view = np.array([stem_id[stem] for stem in stems], dtype=np.int64)
    prefix = prefix_of_set.astype(np.int64)[scan.set_index]
    key = prefix * len(stem_id) + stem_of_view[scan.view_index]
    _, first = np.unique(key, return_index=True)
    twice = np.setdiff1d(np.arange(len(key)), first)[:20].tolist()
    view = scan.view_index[first]
    labels = [f"_{direction}_{longitude:03d}" for direction, longitude in scan.view_fields[:, [2, 5]]]
    view_groups = sorted(set(labels))
    group_of_view = np.array([view_groups.index(label) for label in labels], dtype=np.int64)
    is_combination = np.array([len(parts) > 1 for parts in split_names])
    prefix = prefix[first]
    group = prefix * len(view_groups) + np.where(is_combination[prefix], 0, group_of_view[view])
    return _Candidates(
        scan, names, prefix_of_set, codes, prefix_codes, first, prefix, view, group, group_of_view, view_groups,
        len(key) - len(first), [scan.path(photo) for photo in twice],
    )  # fmt: skip


def _not_excluded(candidates: _Candidates, exclude: Path | None) -> tuple[np.ndarray, int]:
    allowed = np.ones(len(candidates.photos), dtype=bool)
    if exclude is None:
        return allowed, 0
    earlier = read_manifest(exclude)
    groups = {
        group
        for group, part in zip(earlier["group"].to_pylist(), earlier["split"].to_pylist(), strict=True)
        if part == "val"
    }
    unique, first, inverse = np.unique(candidates.group, return_index=True, return_inverse=True)
    known = [candidates.group_name(candidates.prefix[i], candidates.view[i]) in groups for i in first]
    allowed = ~np.array(known, dtype=bool)[inverse] if len(unique) else allowed
    return allowed, int((~allowed).sum())


def _choose(
    candidates: _Candidates,
    allowed: np.ndarray,
    num_photos: int | None,
    num_classes: int | None,
    combination_fraction: float,
    min_photos_per_class: int,
    seed: int,
) -> tuple[sampling.Chosen, list[str]]:
    per_prefix = np.bincount(candidates.prefix[allowed], minlength=len(candidates.prefix_names))
    single_counts = np.zeros(len(candidates.codes), dtype=np.int64)
    total_counts = np.zeros(len(candidates.codes), dtype=np.int64)
    single_class = np.full(len(candidates.prefix_names), -1, dtype=np.int64)
    for prefix, codes in enumerate(candidates.prefix_codes):
        total_counts[codes] += per_prefix[prefix]
        if len(codes) == 1:
            single_class[prefix] = codes[0]
            single_counts[codes] += per_prefix[prefix]
    combinations = np.array([i for i, codes in enumerate(candidates.prefix_codes) if len(codes) > 1], dtype=np.int64)
    code_hashes = sampling.name_hashes(candidates.codes, seed, "class")
    classes = sampling.choose_classes(
        single_counts,
        total_counts,
        [candidates.prefix_codes[i] for i in combinations],
        per_prefix[combinations],
        code_hashes,
        num_classes=num_classes,
        num_photos=num_photos,
        combination_fraction=combination_fraction,
        min_photos_per_class=min_photos_per_class,
    )
    is_class = np.zeros(len(candidates.codes), dtype=bool)
    is_class[classes] = True
    usable = np.array([is_class[codes].all() for codes in candidates.prefix_codes])
    prefix_hashes = sampling.name_hashes(candidates.prefix_names, seed, "photo")
    view_hashes = sampling.name_hashes([view.rpartition(".")[0] for view in candidates.scan.views], seed, "view")
    chosen = sampling.choose_photos(
        single_class[candidates.prefix],
        usable[candidates.prefix] & allowed,
        sampling.mix(prefix_hashes[candidates.prefix], view_hashes[candidates.view]),
        classes,
        code_hashes[classes],
        num_photos=num_photos,
        combination_fraction=combination_fraction,
    )
    small = [candidates.codes[i] for i in np.flatnonzero(total_counts < min_photos_per_class)]
    return chosen, small


def _split(
    candidates: _Candidates, photos: np.ndarray, val_fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Validation mask, and mask of photos that show a class no training photo shows; both of len(photos)."""
    prefix = candidates.prefix[photos]
    is_single = np.array([len(codes) == 1 for codes in candidates.prefix_codes])[prefix]
    is_val = np.zeros(len(photos), dtype=bool)
    _, group = np.unique(candidates.group[photos], return_inverse=True)
    names: list[str] = [""] * (int(group.max()) + 1)
    for position, index in enumerate(group):
        if not names[index]:
            names[index] = candidates.group_name(prefix[position], candidates.view[photos[position]])
    hashes = sampling.name_hashes(names, seed, "split")
    is_val[is_single] = split.split_single(prefix[is_single], group[is_single], hashes, val_fraction)

    in_train = Counter(
        candidates.codes[candidates.prefix_codes[index][0]] for index in prefix[is_single & ~is_val].tolist()
    )
    combination_groups = [names[index] for index in group[~is_single]]
    order = sorted(set(group[~is_single].tolist()), key=lambda index: (hashes[index], names[index]))
    group_codes = {name: set(aihub.split_codes(name)) for name in set(combination_groups)}
    chosen = split.split_combinations(
        combination_groups, group_codes, [names[index] for index in order], val_fraction, in_train
    )
    is_val[~is_single] = [name in chosen for name in combination_groups]

    learnable = np.zeros(len(candidates.codes), dtype=bool)
    for index in set(prefix[~is_val].tolist()):
        learnable[candidates.prefix_codes[index]] = True
    knows_all = np.array([learnable[codes].all() for codes in candidates.prefix_codes])
    return is_val, ~knows_all[prefix]


def _read_rows(
    candidates: _Candidates,
    photos: np.ndarray,
    is_val: np.ndarray,
    data_root: Path,
    num_workers: int | None,
    progress: Progress | None,
) -> tuple[pa.Table, dict[str, str], dict[str, list[str]], dict]:
    scan = candidates.scan
    positions = candidates.photos[photos]
    stems = [scan.stem(position) for position in positions]
    # By sample id: the order must not depend on which folder or archive a photo lies in.
    order = sorted(range(len(stems)), key=stems.__getitem__)
    jobs: list[tuple[str, str]] = []
    for row in order:
        index = scan.set_index[positions[row]]
        prefix = scan.prefixes[index]
        paths = aihub.label_paths(scan.folders[index], prefix, stems[row])
        jobs += zip(paths, aihub.split_codes(prefix), strict=True)
    labels = _read_all(data_root, jobs, num_workers, progress)

    columns: dict[str, list] = {name: [] for name in SCHEMA.names[:10]}
    names: dict[str, Counter] = {}
    edi_codes: dict[str, set[str]] = {}
    problems: dict[str, list[str]] = {}
    cursor = 0
    for row in order:
        position = positions[row]
        index = scan.set_index[position]
        codes = aihub.split_codes(scan.prefixes[index])
        found = labels[cursor : cursor + len(codes)]
        for code, label, (path, _) in zip(codes, found, jobs[cursor : cursor + len(codes)], strict=True):
            if label.problem:
                problems.setdefault(label.problem, []).append(path)
            if label.name:
                names.setdefault(code, Counter())[label.name] += 1
            edi_codes.setdefault(code, set()).update(label.edi_codes)
        cursor += len(codes)
        sizes = Counter((label.width, label.height) for label in found if label.width and label.height)
        width, height = min(sizes, key=lambda size: (-sizes[size], size)) if sizes else (0, 0)
        columns["sample_id"].append(stems[row])
        columns["image_path"].append(scan.path(position))
        columns["image_type"].append("combination" if len(codes) > 1 else "single")
        columns["codes"].append(codes)
        columns["boxes"].append([label.box for label in found])
        columns["width"].append(width)
        columns["height"].append(height)
        columns["group"].append(candidates.group_name(candidates.prefix[photos[row]], candidates.view[photos[row]]))
        columns["split"].append("val" if is_val[row] else "train")
        columns["source"].append("aihub/" + scan.folders[index].split("/images/")[0].rpartition("/")[2])
    fields = scan.view_fields[scan.view_index[positions[order]]]
    arrays = [pa.array(columns[name], type=SCHEMA.field(name).type) for name in columns]
    arrays += [pa.array(fields[:, i], type=pa.int16()) for i in range(len(CAMERA_FIELDS))]
    table = pa.table(arrays, names=[*columns, *CAMERA_FIELDS])
    best_names = {code: min(seen, key=lambda name: (-seen[name], name)) for code, seen in names.items()}
    report = {
        "files": len(jobs),
        "boxes": len(jobs) - sum(map(len, problems.values())),
        "problems": {problem: _listed(paths) for problem, paths in sorted(problems.items())},
    }
    return table, best_names, {code: sorted(values) for code, values in edi_codes.items()}, report


def _read_all(
    data_root: Path, jobs: list[tuple[str, str]], num_workers: int | None, progress: Progress | None
) -> list[Label]:
    root = os.fspath(data_root)
    chunks = [jobs[start : start + _CHUNK] for start in range(0, len(jobs), _CHUNK)]
    workers = num_workers or os.cpu_count() or 1
    labels: list[Label] = []
    if workers == 1 or len(jobs) < _PROCESSES_FROM:
        for chunk in chunks:
            labels += read_labels(root, chunk)
            _report(progress, len(labels), len(jobs))
        return labels
    # A fork would copy Arrow's threads in an unknown state; the server process has imported nothing but this module.
    with ProcessPoolExecutor(workers, mp_context=get_context("forkserver")) as pool:
        for part in pool.map(read_labels, [root] * len(chunks), chunks):
            labels += part
            _report(progress, len(labels), len(jobs))
    return labels


def _report(progress: Progress | None, done: int, total: int) -> None:
    if progress is not None:
        progress("labels", done, total)


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
