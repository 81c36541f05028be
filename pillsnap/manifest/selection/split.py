"""Splits photos into train and val: a group stays in one split, and every class keeps a training photo."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import pairwise

import numpy as np


def split_single(
    photo_class: np.ndarray, photo_group: np.ndarray, group_hashes: np.ndarray, val_fraction: float
) -> np.ndarray:
    """True for photos of one pill that go to validation. bool, shape (photos,).

    `photo_class`, `photo_group`: ids; a group has one class. `group_hashes[group]` orders the groups. Per class, groups
    go to validation in hash order until the share is nearest `val_fraction`; the rounding error is carried to the next
    class, so that the total meets the fraction. The last group of a class always stays in training.
    """
    is_val = np.zeros(len(photo_class), dtype=bool)
    order = np.lexsort((group_hashes[photo_group], photo_class))
    bounds = np.flatnonzero(np.diff(photo_class[order], prepend=-1, append=-2))
    carried = 0.0
    for start, stop in pairwise(bounds):
        members = order[start:stop]
        groups = photo_group[members]
        ends = np.flatnonzero(np.diff(groups, append=-1)) + 1
        target = len(members) * val_fraction + carried
        # At most half a class beyond its own share, so that a large class cannot drain a small one.
        target = min(max(target, 0.0), len(members) * min(1.0, val_fraction + 0.5))
        sizes = np.concatenate([[0], ends[:-1]])
        taken = int(sizes[np.argmin(np.abs(sizes - target))])
        is_val[members[:taken]] = True
        carried += len(members) * val_fraction - taken
    return is_val


def split_combinations(
    groups: Mapping[str, tuple[int, set[str]]], val_fraction: float, train_counts: Mapping[str, int]
) -> set[str]:
    """Names of the combinations that go to validation.

    `groups`: (photos, codes) by name, in the order to try. `train_counts`: further training photos per code. A
    combination goes to validation if that brings the share nearer to `val_fraction` and each of its codes keeps a
    training photo.
    """
    remaining = Counter(train_counts)
    for size, codes in groups.values():
        remaining.update(dict.fromkeys(codes, size))
    target = sum(size for size, _ in groups.values()) * val_fraction
    taken = 0
    chosen = set()
    for name, (size, codes) in groups.items():
        if abs(taken + size - target) <= abs(taken - target) and all(remaining[code] > size for code in codes):
            chosen.add(name)
            taken += size
            remaining.subtract(dict.fromkeys(codes, size))
    return chosen
