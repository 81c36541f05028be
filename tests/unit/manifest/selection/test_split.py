"""Splits keep groups whole, meet the fraction and leave every class a training photo."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from pillsnap.manifest.selection.sampling import name_hashes
from pillsnap.manifest.selection.split import split_combinations, split_single


def test_single_split_keeps_groups_whole_and_meets_the_fraction() -> None:
    photo_class = np.repeat(np.arange(100), 40)
    photo_group = np.repeat(np.arange(100 * 10), 4)
    hashes = name_hashes([str(i) for i in range(1000)], 1, "split")
    is_val = split_single(photo_class, photo_group, hashes, 0.185)
    per_group = is_val.reshape(1000, 4)
    assert set(per_group.sum(axis=1)) == {0, 4}
    assert is_val.mean() == pytest.approx(0.185, abs=0.0005)
    assert (~is_val).reshape(100, 40).any(axis=1).all()
    assert is_val.reshape(100, 40).any(axis=1).all()


def test_class_with_one_group_trains() -> None:
    is_val = split_single(np.array([0, 0, 0, 1, 1]), np.array([0, 0, 0, 1, 2]), name_hashes("abc", 0, "s"), 0.5)
    assert not is_val[:3].any()
    assert is_val[3:].sum() == 1


def test_order_of_photos_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    photo_class = np.repeat(np.arange(7), 12)
    photo_group = np.arange(84) // 3
    hashes = name_hashes([str(i) for i in range(28)], 5, "split")
    order = rng.permutation(84)
    straight = split_single(photo_class, photo_group, hashes, 0.3)
    shuffled = split_single(photo_class[order], photo_group[order], hashes, 0.3)
    assert np.array_equal(straight[order], shuffled)


@pytest.mark.parametrize("names", list(itertools.permutations(["AB", "BC", "CD", "AC"])))
def test_combination_split_keeps_a_training_photo_of_every_code(names: tuple[str, ...]) -> None:
    groups = {name: (3, set(name)) for name in names}
    chosen = split_combinations(groups, 0.5, {})
    train_codes = {code for name, (_, codes) in groups.items() if name not in chosen for code in codes}
    assert train_codes == {"A", "B", "C", "D"}

    def may_go(name: str, taken: set[str]) -> bool:
        return set(name) <= {code for other in names if other not in taken | {name} for code in other}

    # 6 of the 12 photos are wanted: two combinations go, or one where no second one may.
    assert len(chosen) == 2 or (len(chosen) == 1 and not any(may_go(name, chosen) for name in set(names) - chosen))


def test_combination_split_uses_single_photos_of_a_code() -> None:
    groups = {"AB": (3, {"A", "B"})}
    assert split_combinations(groups, 1.0, {}) == set()
    assert split_combinations(groups, 1.0, {"A": 1, "B": 1}) == {"AB"}
