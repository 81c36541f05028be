"""The same photograph on both sides of the split though its bytes differ: saved again, resized or brightened.

Measured on generated and real photographs: copies saved at JPEG quality 50, halved, brightened by a tenth or with noise
of 5 grey levels have frames above 0.99 and pills above 0.98 (halved copies of photos under 500 px: mostly above 0.9);
photos of different groups that pass for the frame correlate at 0.82 at most for the pills.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MIN_FRAME_SIMILARITY = 0.985
"""Correlation of the frame hashes."""
MIN_PILL_SIMILARITY = 0.97
"""Correlation of the thumbnails of the pills' area."""
_BLOCK = 256
"""Validation photos compared at a time: with 81,500 in training their similarities take 83 MB."""


def find_pairs(frame_hashes: Sequence[bytes], thumbnails: Sequence[bytes], is_val: np.ndarray) -> list[tuple[int, int]]:
    """(train, val) index pairs of near-duplicates, sorted. Photos without a hash (b"") are skipped.

    Every hash of one side is compared with every one of the other: time grows with the product of their numbers.
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
    """Zero mean and unit length each, so that a dot product is a correlation. float32, shape (rows, values)."""
    stacked = np.frombuffer(b"".join(values[row] for row in rows), dtype=kind).reshape(len(rows), -1)
    centred = stacked - stacked.mean(axis=1, keepdims=True, dtype=np.float32)
    return centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-6)
