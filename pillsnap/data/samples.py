"""Manifest rows -> the samples of a task: photos for detection, labelled pills for classification."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pillsnap.errors import UserError


@dataclass(frozen=True)
class TaskSamples:
    """Samples of one task. `train` and `val` have sample_id, location (photos/archives.py) and columns of the task."""

    train: pa.Table
    val: pa.Table
    left_out: dict[str, int]
    """Number of photos or pills left out, by reason."""
    num_combinations: int = 0
    """The last samples of `train` that are combination photos, if these are drawn apart from the others."""
    num_val: int | None = None
    """Validation samples in the manifest when `val` is a part of them."""


def detection_samples(
    manifest: pa.Table, *, keep_incomplete: bool = False, combinations_last: bool = False, num_val: int | None = None
) -> TaskSamples:
    """One sample per photo, with `boxes` (list of [x, y, w, h] in pixels) and `complete`, whether all pills have one.

    An incomplete photo would train unlabelled pills as background: it is left out of training unless
    `keep_incomplete`, and always out of validation, where it would count correct detections as false. With
    `combinations_last` training has the combination photos after the others. Of more than `num_val` validation samples,
    that many are chosen, stratified by image type.
    """
    complete = np.array([all(box is not None for box in boxes) for boxes in manifest["boxes"].to_pylist()], dtype=bool)
    split = manifest["split"].to_numpy(zero_copy_only=False)
    frame = manifest.select(["sample_id", "location", "boxes"])
    frame = frame.append_column("complete", pa.array(complete))
    train = (split == "train") & (complete | keep_incomplete)
    combination = pc.equal(manifest["image_type"], "combination").to_numpy()
    chosen = np.flatnonzero(train)
    if combinations_last:
        chosen = chosen[np.argsort(combination[chosen], kind="stable")]
    validated = np.flatnonzero((split == "val") & complete)
    part = stratified(manifest["sample_id"].take(validated).to_pylist(), combination[validated], num_val)
    return TaskSamples(
        train=_without_empty_boxes(frame.take(chosen)),
        val=_without_empty_boxes(frame.take(validated[part])),
        left_out={"photos with unlabelled pills": int((~complete & ~train).sum())},
        num_combinations=int(combination[chosen].sum()) if combinations_last else 0,
        num_val=len(validated),
    )


def classification_samples(
    manifest: pa.Table, codes: list[str], found_boxes: dict[str, list] | None = None, *, num_val: int | None = None
) -> TaskSamples:
    """One sample per labelled pill: sample_id, location, photo_id, image_type, box_index, box ([x, y, w, h] in
    pixels), label.

    `found_boxes` (sample id -> boxes in the order of its codes, None for not found) replaces missing boxes. Of more
    than `num_val` validation samples, that many are chosen, stratified by class. Raises UserError when there is no
    sample.
    """
    found_boxes = found_boxes or {}
    labels = {code: index for index, code in enumerate(codes)}
    columns: dict[str, list] = {
        name: [] for name in ("sample_id", "location", "photo_id", "image_type", "box_index", "box", "label", "split")
    }
    no_box = unknown = 0
    names = ["sample_id", "location", "image_type", "codes", "boxes", "split"]
    for row in manifest.select(names).to_pylist():
        found = found_boxes.get(row["sample_id"], [None] * len(row["codes"]))
        for index, (code, box) in enumerate(zip(row["codes"], row["boxes"], strict=True)):
            box = box or found[index]
            if code not in labels:
                unknown += 1
                continue
            if box is None:
                no_box += 1
                continue
            values = (
                f"{row['sample_id']}#{index}",
                row["location"],
                row["sample_id"],
                row["image_type"],
                index,
                box,
                labels[code],
            )
            for name, value in zip(columns, (*values, row["split"]), strict=True):
                columns[name].append(value)
    box_type = pa.list_(pa.float32())
    table = pa.table({name: pa.array(values, box_type if name == "box" else None) for name, values in columns.items()})
    if not len(table):
        raise UserError(
            "The manifest has no labelled pill to classify: build it again with labels, or train detection first."
        )
    val = table.filter(pc.equal(table["split"], "val")).drop_columns("split")
    return TaskSamples(
        train=table.filter(pc.equal(table["split"], "train")).drop_columns("split"),
        val=val.take(stratified(val["sample_id"].to_pylist(), val["label"].to_numpy(), num_val)),
        left_out={"pills without a box": no_box, "pills of a class without training photos": unknown},
        num_val=len(val),
    )


def stratified(sample_ids: list[str], strata: np.ndarray, number: int | None) -> np.ndarray:
    """Ascending rows of a sample of `number` with the proportions of `strata`, or all rows.

    A function of the ids and strata alone: every n-th row in the order of stratum and hash of the id, so that the size
    of a stratum is right within one. Runs with other seeds are compared on the same samples.
    """
    if number is None or number >= len(sample_ids):
        return np.arange(len(sample_ids))
    hashes = [hashlib.blake2b(sample_id.encode(), digest_size=8).digest() for sample_id in sample_ids]
    order = np.lexsort([np.frombuffer(b"".join(hashes), "<u8"), strata])
    return np.sort(order[(2 * np.arange(number) + 1) * len(order) // (2 * number)])


def _without_empty_boxes(table: pa.Table) -> pa.Table:
    boxes = [
        [box for box in row if box is not None and box[2] > 0 and box[3] > 0] for row in table["boxes"].to_pylist()
    ]
    return table.set_column(2, "boxes", pa.array(boxes, pa.list_(pa.list_(pa.float32()))))


def balance_classes(samples: pa.Table, strength: float) -> pa.Table:
    """Repeat samples of rare classes. `samples` has sample_id and label; each sample is kept.

    A class of n samples gets m * (n / m) ** (1 - strength) rows, where m is the n of the most frequent class: 0 changes
    nothing, 1 makes all classes equally frequent. A repetition has its own id, and so its own augmentation.
    """
    labels = samples["label"].to_numpy()
    if strength == 0 or not len(labels):
        return samples
    counts = np.bincount(labels)
    most = counts.max()
    num_rows = np.round(most * (counts / most) ** (1 - strength)).astype(np.int64)
    order = np.argsort(labels, kind="stable")
    within = np.empty(len(labels), np.int64)
    within[order] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    base, extra = np.divmod(num_rows[labels], counts[labels])
    copies = base + (within < extra)
    rows = np.repeat(np.arange(len(labels)), copies)
    repetition = np.arange(len(rows)) - np.repeat(np.cumsum(copies) - copies, copies)
    ids = samples["sample_id"].take(rows).to_pylist()
    ids = [f"{name}~{number + 1}" if number else name for name, number in zip(ids, repetition.tolist(), strict=True)]
    column = samples.column_names.index("sample_id")
    return samples.take(rows).set_column(column, "sample_id", pa.array(ids, pa.string()))
