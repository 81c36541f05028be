"""Chooses the classes and photos of a manifest. Pure functions of arrays.

Every choice ranks hashes of (seed, name), so the same seed and names give the same sample on any machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


def name_hashes(names: Sequence[str], seed: int, purpose: str) -> np.ndarray:
    """64-bit hashes of names, keyed by seed and purpose. uint64, shape (names,)."""
    key = f"{seed}/{purpose}".encode()
    digests = (hashlib.blake2b(name.encode(), digest_size=8, key=key[:64]).digest() for name in names)
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)


def mix(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Hash of a pair of hashes: the splitmix64 finaliser (Steele, Lea and Flood, 2014). uint64."""
    with np.errstate(over="ignore"):
        value = first * np.uint64(0x9E3779B97F4A7C15) + second
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return value ^ (value >> np.uint64(31))


def choose_classes(
    single_counts: np.ndarray,
    total_counts: np.ndarray,
    combinations: Sequence[np.ndarray],
    combination_sizes: np.ndarray,
    code_hashes: np.ndarray,
    *,
    num_classes: int | None,
    num_photos: int | None,
    combination_fraction: float,
    min_photos_per_class: int,
) -> np.ndarray:
    """Code ids to train on, sorted.

    `single_counts`, `total_counts`: photos per code. `combinations`, `combination_sizes`: code ids and number of photos
    per combination. A combination is usable only if all its codes are classes, so the codes that the requested number
    of combination photos needs are chosen first; the rest are drawn by hash, classes with enough single photos first.
    """
    eligible = total_counts >= min_photos_per_class
    if num_classes is None or int(eligible.sum()) <= num_classes:
        return np.flatnonzero(eligible)
    chosen = np.zeros(0, dtype=np.int64)
    if len(combinations) and combination_fraction > 0:
        wanted = np.inf if num_photos is None else num_photos * combination_fraction
        chosen = _combination_core(combinations, combination_sizes, eligible, code_hashes, num_classes, wanted)
    share = 0 if num_photos is None else num_photos * (1 - combination_fraction) / num_classes
    rest = np.setdiff1d(np.flatnonzero(eligible), chosen)
    rest = rest[np.lexsort((code_hashes[rest], single_counts[rest] < share))]
    return np.sort(np.concatenate([chosen, rest[: num_classes - len(chosen)]]))


def _combination_core(
    combinations: Sequence[np.ndarray],
    sizes: np.ndarray,
    eligible: np.ndarray,
    code_hashes: np.ndarray,
    num_classes: int,
    wanted: float,
) -> np.ndarray:
    """At most `num_classes` codes, chosen greedily until their combinations have `wanted` photos.

    Each step takes the combination that needs the fewest further codes; ties are broken by the number of combinations
    its codes are in, then by hash.
    """
    usable = [i for i, codes in enumerate(combinations) if eligible[codes].all()]
    members = [np.unique(combinations[i]) for i in usable]
    if not members:
        return np.zeros(0, dtype=np.int64)
    flat = np.concatenate(members)
    owner = np.repeat(np.arange(len(members)), [len(codes) for codes in members])
    popularity = np.bincount(owner, weights=np.bincount(flat, minlength=len(eligible))[flat])
    ties = np.array([np.bitwise_xor.reduce(code_hashes[codes]) for codes in members])
    chosen = np.zeros(len(eligible), dtype=bool)
    while True:
        missing = np.bincount(owner, weights=~chosen[flat]).astype(np.int64)
        budget = num_classes - int(chosen.sum())
        options = np.flatnonzero((missing > 0) & (missing <= budget))
        if not len(options) or sizes[usable][missing == 0].sum() >= wanted:
            return np.flatnonzero(chosen)
        order = np.lexsort((ties[options], -popularity[options], missing[options]))
        chosen[members[options[order[0]]]] = True


def quotas(available: np.ndarray, total: int, tie_hashes: np.ndarray) -> np.ndarray:
    """Split `total` over classes as evenly as `available` (int, per class) allows; the remainder by hash. int64."""
    total = min(total, int(available.sum()))
    low, high = 0, int(available.max(initial=0))
    while low < high:  # the highest level within the total
        level = (low + high + 1) // 2
        if int(np.minimum(available, level).sum()) <= total:
            low = level
        else:
            high = level - 1
    share = np.minimum(available, low).astype(np.int64)
    open_classes = np.flatnonzero(available > low)
    open_classes = open_classes[np.argsort(tie_hashes[open_classes], kind="stable")]
    share[open_classes[: total - int(share.sum())]] += 1
    return share


def choose_photos(
    photo_class: np.ndarray,
    is_usable: np.ndarray,
    photo_hashes: np.ndarray,
    classes: np.ndarray,
    class_hashes: np.ndarray,
    *,
    num_photos: int | None,
    combination_fraction: float,
) -> np.ndarray:
    """Photo indices to take, sorted.

    `photo_class`: code id of a single photo, -1 for a combination. `is_usable`: not excluded, and all codes are in
    `classes` (sorted code ids). A shortage of single or combination photos is filled with the other kind.
    """
    combination = np.flatnonzero(is_usable & (photo_class < 0))
    single = np.flatnonzero(is_usable & (photo_class >= 0))
    if num_photos is None:
        num_combination, num_single = len(combination), len(single)
    else:
        num_combination = min(round(num_photos * combination_fraction), len(combination))
        num_single = min(num_photos - num_combination, len(single))
        num_combination = min(num_photos - num_single, len(combination))
    combination = combination[np.argsort(photo_hashes[combination], kind="stable")[:num_combination]]
    owner = np.searchsorted(classes, photo_class[single])
    available = np.bincount(owner, minlength=len(classes))
    share = quotas(available, num_single, class_hashes)
    order = np.lexsort((photo_hashes[single], owner))
    starts = np.concatenate([[0], np.cumsum(available)[:-1]]) if len(available) else np.zeros(0, dtype=np.int64)
    rank = np.arange(len(single)) - np.repeat(starts, available)
    taken = single[order][rank < np.repeat(share, available)]
    return np.sort(np.concatenate([taken, combination]))
