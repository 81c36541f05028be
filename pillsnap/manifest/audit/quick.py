"""The part of the audit that takes no time, for the start of a training: empty splits, groups, sizes of some photos."""

from __future__ import annotations

import math

import pyarrow as pa

from pillsnap.manifest.audit.files import inspect_photos
from pillsnap.manifest.audit.rows import check_rows, read_columns

CONFIDENCE = 0.995
_PHOTOS = 64
_REFUSED = ("no_train", "no_val", "group_overlap")


def reasons_not_to_train(manifest: pa.Table, data_root: str, max_pixels: int, max_fraction: float) -> list[str]:
    """One line per reason, none when training may start. The headers of 64 photos, spread over the manifest, are read;
    photos of another size than their labels count against `max_fraction`, unreadable ones are left to the quarantine.
    """
    columns = read_columns(manifest)
    found = [
        f"{finding.message} ({finding.count:,}, the first {finding.examples[0]})"
        for finding in check_rows(columns, None)
        if finding.kind in _REFUSED
    ]
    step = max(1, -(-len(manifest) // _PHOTOS))
    rows = list(range(0, len(manifest), step))
    locations = manifest["location"].to_pylist()
    seen = inspect_photos(data_root, [(locations[row], []) for row in rows], False, max_pixels)
    sized = [(row, one) for row, one in zip(rows, seen, strict=True) if not one.problem and columns["width"][row]]
    other = [
        f"{columns['image_path'][row]} ({one.width} x {one.height})"
        for row, one in sized
        if (one.width, one.height) != (columns["width"][row], columns["height"][row])
    ]
    if exceeds(len(other), len(sized), max_fraction):
        found.append(
            f"{len(other)} of {len(sized)} photos tried have another size than their labels, so boxes are wrong; the "
            f"first {other[0]}"
        )
    return found


def exceeds(count: int, total: int, fraction: float) -> bool:
    """Whether `count` of `total` shows, with 99.5 % confidence, a share above `fraction` (binomial test, one-sided)."""
    if count <= fraction * total:
        return False
    below = sum(math.comb(total, k) * fraction**k * (1 - fraction) ** (total - k) for k in range(count))
    return below >= CONFIDENCE
