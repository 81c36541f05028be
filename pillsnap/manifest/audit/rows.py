"""Checks the rows of a manifest, without reading photos."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa

from pillsnap.manifest.aihub import parse_name
from pillsnap.manifest.audit.report import Finding, finding
from pillsnap.manifest.table import SPLITS, ClassInfo

_MIN_TRAIN_PHOTOS = 5
_MAX_IMBALANCE = 100


def check_rows(
    columns: dict[str, list], classes: list[ClassInfo] | None, unknown: Iterable[str] = ()
) -> Iterator[Finding]:
    """Findings about ids, splits, codes, groups and class balance. `columns`: manifest columns as lists; `unknown`:
    codes left out of training on purpose.
    """
    ids, paths, splits = columns["sample_id"], columns["image_path"], columns["split"]
    yield from finding("duplicate_sample_id", "error", "sample ids occur more than once", _repeated(ids))
    yield from finding("duplicate_path", "error", "photos occur in more than one row", _repeated(paths))
    odd = [name for name, split in zip(ids, splits, strict=True) if split not in SPLITS]
    yield from finding("bad_split", "error", "rows are neither in train, val nor test", odd)
    for split in ("train", "val"):
        if split not in splits:
            yield from finding(f"no_{split}", "error", f"the manifest has no {split} photos", [split])
    yield from _check_codes(columns, classes, set(unknown))
    sides = defaultdict(set)
    for group, split in zip(columns["group"], splits, strict=True):
        sides[group].add(split)
    overlap = sorted(str(group) for group, seen in sides.items() if len(seen) > 1 and "train" in seen)
    yield from finding(
        "group_overlap", "error", "groups are in train and in another split: near-identical photos leak", overlap
    )
    shared = sorted(str(group) for group, seen in sides.items() if len(seen) > 1 and "train" not in seen)
    yield from finding("group_in_val_and_test", "warning", "groups are in val and in test", shared)
    yield from _check_balance(columns)


def check_boxes(columns: dict[str, list]) -> Iterator[Finding]:
    """Findings about labels: their number, and boxes that are empty or outside the frame (pixels, [x, y, w, h])."""
    ids, codes, boxes = columns["sample_id"], columns["codes"], columns["boxes"]
    uneven = [name for name, a, b in zip(ids, codes, boxes, strict=True) if len(a) != len(b)]
    yield from finding("uneven_boxes", "error", "rows have different numbers of boxes and codes", uneven)
    twice = [name for name, a, b in zip(ids, codes, boxes, strict=True) if _has_box_of_two_classes(a, b)]
    yield from finding("same_box_two_classes", "warning", "photos have one box under two classes", twice)
    repeated = [name for name, a, b in zip(ids, codes, boxes, strict=True) if _has_repeated_pill(a, b)]
    yield from finding("repeated_pill", "warning", "photos have a pill twice: one class, one box", repeated)
    incomplete = [name for name, row in zip(ids, boxes, strict=True) if any(box is None for box in row)]
    yield from finding(
        "incomplete_labels", "warning", "photos show pills without a box: not used for detection training", incomplete
    )
    if len(incomplete) == len(ids):
        yield from finding("no_complete_photo", "error", "no photo has all its boxes: detection cannot be trained", ids)

    owners = [i for i, row in enumerate(boxes) for box in row if box is not None and len(box) == 4]
    values = [box for row in boxes for box in row if box is not None and len(box) == 4]
    wrong = [name for name, row in zip(ids, boxes, strict=True) if any(b is not None and len(b) != 4 for b in row)]
    yield from finding("malformed_box", "error", "boxes are not four numbers", wrong)
    if not values:
        return
    owner = np.array(owners)
    x, y, w, h = np.array(values, dtype=np.float64).T
    width, height = np.array(columns["width"])[owner], np.array(columns["height"])[owner]
    known = (width > 0) & (height > 0)
    finite = np.isfinite([x, y, w, h]).all(axis=0)
    empty = ~finite | (w <= 0) | (h <= 0)
    centre_x, centre_y = x + w / 2, y + h / 2
    outside = ~empty & known & ((centre_x < 0) | (centre_y < 0) | (centre_x > width) | (centre_y > height))
    # One pixel of tolerance: labels are rounded, and some tools include the last pixel.
    crossing = ~empty & ~outside & known & ((x < -1) | (y < -1) | (x + w > width + 1) | (y + h > height + 1))

    def named(mask: np.ndarray) -> list[str]:
        return [ids[i] for i in owner[mask]]

    yield from finding("empty_box", "error", "boxes have no area or are not finite", named(empty))
    yield from finding("box_outside", "error", "boxes have their centre outside the photo", named(outside))
    yield from finding("box_crosses_border", "warning", "boxes cross the border: they are clipped", named(crossing))


def _check_codes(columns: dict[str, list], classes: list[ClassInfo] | None, unknown: set[str]) -> Iterator[Finding]:
    ids, codes, splits = columns["sample_id"], columns["codes"], columns["split"]
    trained = {code for row, split in zip(codes, splits, strict=True) if split == "train" for code in row}
    untrained = sorted({code for row in codes for code in row} - trained - unknown)
    yield from finding("class_only_in_val", "error", "classes occur in validation but not in training", untrained)
    if classes is None:
        yield from finding("no_class_map", "warning", "classes.json is not next to the manifest", ["classes.json"])
    else:
        known = {info.code for info in classes}
        unlisted = sorted(trained - known)
        yield from finding("unknown_code", "error", "codes are not in classes.json", unlisted)
        reused = sorted(trained & unknown)
        yield from finding("unknown_trained", "error", "classes listed as unknown have training photos", reused)
        yield from finding("unused_class", "warning", "classes have no training photo", sorted(known - trained))
    mismatched = []
    for name, path, row in zip(ids, columns["image_path"], codes, strict=True):
        parsed = parse_name(path)
        if parsed is not None and list(parsed.codes) != list(row):
            mismatched.append(name)
    yield from finding("name_mismatch", "error", "the codes differ from the file name", mismatched)
    unnamed = [name for name, row in zip(ids, codes, strict=True) if not row]
    yield from finding("background", "warning", "photos show no pill: used for detection only", unnamed)


def _check_balance(columns: dict[str, list]) -> Iterator[Finding]:
    counts = {"train": Counter(), "val": Counter()}  # type: dict[str, Counter[str]]
    for codes, split in zip(columns["codes"], columns["split"], strict=True):
        if split in counts:
            counts[split].update(set(codes))
    train = counts["train"]
    few = sorted(code for code, count in train.items() if count < _MIN_TRAIN_PHOTOS)
    yield from finding("few_photos", "warning", f"classes have fewer than {_MIN_TRAIN_PHOTOS} training photos", few)
    missing = sorted(set(train) - set(counts["val"]))
    yield from finding("not_validated", "warning", "classes have no validation photo: they are not evaluated", missing)
    if train and max(train.values()) > _MAX_IMBALANCE * min(train.values()):
        most, least = train.most_common()[0], train.most_common()[-1]
        example = f"{most[0]} has {most[1]}, {least[0]} has {least[1]}"
        yield from finding("imbalance", "warning", "the largest class has far more photos than the smallest", [example])


def _has_repeated_pill(codes: list[str], boxes: list[list[float] | None]) -> bool:
    pills = [(code, *box) for code, box in zip(codes, boxes, strict=False) if box is not None]
    return len(set(pills)) < len(pills)


def _has_box_of_two_classes(codes: list[str], boxes: list[list[float] | None]) -> bool:
    pills = {(code, *box) for code, box in zip(codes, boxes, strict=False) if box is not None}
    return len({pill[1:] for pill in pills}) < len(pills)


def _repeated(values: list) -> list[str]:
    return sorted(str(value) for value, count in Counter(values).items() if count > 1)


def read_columns(table: pa.Table) -> dict[str, list]:
    """The columns that the checks read, as Python lists."""
    names = ("sample_id", "image_path", "image_type", "codes", "boxes", "width", "height", "group", "split")
    return {name: table[name].to_pylist() for name in names}
