"""Finds photos of one split that look like a photo of the other: saved again, resized or brightened.

Measured on generated and real photographs: copies saved at JPEG quality 50, halved, brightened by a tenth or with noise
of 5 grey levels correlate above 0.99 as frames and above 0.98 as pills (halved copies of photos under 500 px: mostly
above 0.9). Photos of different groups that pass the frame threshold correlate at 0.82 at most as pills.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MIN_FRAME_SIMILARITY = 0.985
"""Correlation of the frame hashes."""
MIN_PILL_SIMILARITY = 0.97
"""Correlation of the thumbnails of the pills' area."""
_BLOCK = 256
"""Validation photos per comparison: with 81,500 training photos their similarities take 83 MB."""


def find_near_duplicates(
    frame_hashes: Sequence[bytes], thumbnails: Sequence[bytes], is_val: np.ndarray
) -> list[tuple[int, int]]:
    """(train, val) index pairs of near-duplicates, sorted. Photos without a hash (b"") are skipped.

    Every training photo is compared with every validation photo.
    """
    known = np.array([bool(value) for value in frame_hashes], dtype=bool)
    train, val = np.flatnonzero(known & ~is_val), np.flatnonzero(known & is_val)
    if not len(train) or not len(val):
        return []
    train_frames = _unit(frame_hashes, train, np.int8)
    pairs: list[tuple[int, int]] = []
    for start in range(0, len(val), _BLOCK):
        similarities = _unit(frame_hashes, val[start : start + _BLOCK], np.int8) @ train_frames.T
        val_rows, train_rows = np.nonzero(similarities >= MIN_FRAME_SIMILARITY)
        for first in range(0, len(val_rows), _BLOCK):
            a = train[train_rows[first : first + _BLOCK]]
            b = val[start + val_rows[first : first + _BLOCK]]
            similarity = (_unit(thumbnails, a, np.uint8) * _unit(thumbnails, b, np.uint8)).sum(axis=1)
            alike = similarity >= MIN_PILL_SIMILARITY
            pairs += zip(a[alike].tolist(), b[alike].tolist(), strict=True)
    return sorted(pairs)


def _unit(values: Sequence[bytes], rows: np.ndarray, kind: type[np.integer]) -> np.ndarray:
    """Rows with zero mean and unit length: their dot product is a correlation. float32, shape (rows, values)."""
    stacked = np.frombuffer(b"".join(values[row] for row in rows), dtype=kind).reshape(len(rows), -1)
    centred = stacked - stacked.mean(axis=1, keepdims=True, dtype=np.float32)
    return centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-6)
