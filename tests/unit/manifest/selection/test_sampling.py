from __future__ import annotations

import numpy as np
import pytest

from pillsnap.manifest.selection.sampling import choose_classes, choose_photos, mix, name_hashes, quotas


@pytest.mark.parametrize(
    ("available", "total", "expected"),
    [
        ([10, 10, 10], 9, [3, 3, 3]),
        ([1, 10, 10], 9, [1, 4, 4]),
        ([1, 2, 3], 100, [1, 2, 3]),
        ([0, 5], 3, [0, 3]),
        ([], 5, []),
    ],
)
def test_quotas_are_as_even_as_the_tree_allows(available: list[int], total: int, expected: list[int]) -> None:
    hashes = name_hashes([str(i) for i in range(len(available))], 0, "tie")
    assert quotas(np.array(available, dtype=np.int64), total, hashes).tolist() == expected


def test_quotas_give_the_remainder_by_hash() -> None:
    hashes = np.array([3, 1, 2], dtype=np.uint64)
    assert quotas(np.array([5, 5, 5]), 11, hashes).tolist() == [3, 4, 4]


def test_hashes_depend_only_on_name_seed_and_purpose() -> None:
    assert name_hashes(["a", "b"], 1, "x").tolist() == name_hashes(["a", "b"], 1, "x").tolist()
    assert len({*name_hashes(["a"], 1, "x"), *name_hashes(["a"], 2, "x"), *name_hashes(["a"], 1, "y")}) == 3
    first = name_hashes(["a", "b"], 1, "x")
    assert len(set(mix(np.repeat(first, 2), np.tile(first, 2)).tolist())) == 4


def choose(num_classes: int, fraction: float = 0.5, num_photos: int = 12) -> list[int]:
    single = np.array([50, 50, 50, 50, 50, 1, 50])
    combinations = [np.array(pair) for pair in ([0, 1], [1, 2], [1, 6], [3, 4], [1, 5])]
    sizes = np.array([3, 3, 3, 3, 3])
    total = single.copy()
    for pair, size in zip(combinations, sizes, strict=True):
        total[pair] += size
    hashes = name_hashes([str(i) for i in range(7)], 42, "class")
    return choose_classes(
        single, total, combinations, sizes, hashes, num_classes=num_classes, num_photos=num_photos,
        combination_fraction=fraction, min_photos_per_class=2,
    ).tolist()  # fmt: skip


def test_codes_of_most_combinations_come_first() -> None:
    # Six combination photos are wanted: two combinations, and code 1 is in four of the five.
    classes = choose(3)
    assert 1 in classes
    assert len(classes) == 3
    assert sum(set(pair) <= set(classes) for pair in ([0, 1], [1, 2], [1, 6], [1, 5])) == 2


def test_all_classes_if_there_are_too_few() -> None:
    assert choose(7) == [0, 1, 2, 3, 4, 5, 6]
    assert choose(100) == [0, 1, 2, 3, 4, 5, 6]


def test_classes_with_enough_single_photos_are_preferred() -> None:
    assert 5 not in choose(6, fraction=0.0)


def test_photos_are_shared_evenly_and_shortages_filled() -> None:
    photo_class = np.array([0] * 10 + [1] * 10 + [-1] * 4)
    hashes = name_hashes([str(i) for i in range(24)], 0, "photo")
    classes = np.array([0, 1])

    def take(num_photos: int | None, fraction: float) -> list[int]:
        photos = choose_photos(
            photo_class, np.ones(24, dtype=bool), hashes, classes, hashes[:2],
            num_photos=num_photos, combination_fraction=fraction,
        )  # fmt: skip
        return np.bincount(photo_class[photos] + 1, minlength=3).tolist()  # combination, class 0, class 1

    assert take(10, 0.2) == [2, 4, 4]
    assert take(16, 0.5) == [4, 6, 6]  # only four combination photos exist: singles make up
    assert take(23, 0.1) == [3, 10, 10]  # only twenty single photos exist: combinations make up
    assert take(None, 0.0) == [4, 10, 10]
