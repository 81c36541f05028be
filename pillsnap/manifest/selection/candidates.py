"""The photos that can be sampled: every distinct photo of a scan, its codes and its group, as arrays of ids."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from pillsnap.manifest.aihub import split_codes
from pillsnap.manifest.scan import Scan
from pillsnap.manifest.selection import sampling, split
from pillsnap.manifest.table import CAMERA_FIELDS, read_manifest

DEFAULT_GROUP_BY = ("direction", "longitude")
_GROUP_FORMAT = {"longitude": "03d"}


@dataclass(frozen=True)
class Sample:
    """A sample. `photos`: indices of candidates; `is_val` (bool): their split; equal lengths."""

    photos: np.ndarray
    is_val: np.ndarray
    too_few_photos: list[str]
    """Codes with fewer photos than min_photos_per_class."""
    num_unlearnable: int
    """Number of validation photos left out because they show a code without a training photo."""


class Candidates:
    """Distinct photos of a scan. A *prefix* is the codes part of a file name: one drug or one combination."""

    def __init__(self, scan: Scan, group_by: Sequence[str] = DEFAULT_GROUP_BY) -> None:
        """`group_by`: fields (of table.CAMERA_FIELDS) that the photos of a group share, for photos of one pill."""
        prefix_names, prefix_of_set = np.unique(np.array(scan.prefixes), return_inverse=True)
        self.scan = scan
        self.prefixes = [str(name) for name in prefix_names]
        parts = [split_codes(prefix) for prefix in self.prefixes]
        self.codes = sorted({code for codes in parts for code in codes})
        code_id = {code: i for i, code in enumerate(self.codes)}
        self.prefix_codes = [np.array([code_id[code] for code in codes]) for codes in parts]
        self.is_combination = np.array([len(codes) > 1 for codes in parts])

        # A stem with two extensions, or in two folders, is one photo saved twice: the first is kept.
        self.view_stems = [view.rpartition(".")[0] for view in scan.views]
        stem_id = {stem: i for i, stem in enumerate(sorted(set(self.view_stems)))}
        stem_of_view = np.array([stem_id[stem] for stem in self.view_stems], dtype=np.int64)
        prefix = prefix_of_set.astype(np.int64)[scan.set_index]
        _, self.positions = np.unique(prefix * len(stem_id) + stem_of_view[scan.view_index], return_index=True)
        """Index into the scan of each candidate."""
        self.prefix = prefix[self.positions]
        self.view = scan.view_index[self.positions]

        # A combination is one group. Photos of one pill from one side and longitude differ only in light and height.
        self._group_by = tuple(group_by)
        labels = [self._group_label(fields) for fields in scan.view_fields.tolist()]
        self._group_labels = sorted(set(labels))
        label_id = {label: i for i, label in enumerate(self._group_labels)}
        self._label_of_view = np.array([label_id[label] for label in labels], dtype=np.int64)
        within = np.where(self.is_combination[self.prefix], 0, self._label_of_view[self.view])
        self.group = self.prefix * len(self._group_labels) + within

    def __len__(self) -> int:
        return len(self.positions)

    def group_name(self, photo: int) -> str:
        """`K-000114_1_260` (side 1, longitude 260) for one pill, `K-A-B` for a combination."""
        prefix = self.prefix[photo]
        if self.is_combination[prefix]:
            return self.prefixes[prefix]
        return self.prefixes[prefix] + self._group_labels[self._label_of_view[self.view[photo]]]

    def _group_label(self, fields: Sequence[int]) -> str:
        return "".join(f"_{fields[CAMERA_FIELDS.index(name)]:{_GROUP_FORMAT.get(name, '')}}" for name in self._group_by)

    def found_twice(self, limit: int) -> list[str]:
        """Paths of the first `limit` photos that were dropped because another has the same name."""
        twice = np.ones(len(self.scan), dtype=bool)
        twice[self.positions] = False
        return [self.scan.path(position) for position in np.flatnonzero(twice)[:limit]]

    def outside(self, exclude: Path | None) -> np.ndarray:
        """False for photos in the group of a validation photo of the manifest `exclude`. bool, shape (candidates,).

        The earlier photos are grouped by the present `group_by`.
        """
        if exclude is None or not len(self):
            return np.ones(len(self), dtype=bool)
        earlier = read_manifest(exclude)
        groups: set[str] = set()
        for row in earlier.filter(pc.equal(earlier["split"], "val")).to_pylist():
            fields = [row[name] for name in CAMERA_FIELDS]
            prefix = "K-" + "-".join(code.removeprefix("K-") for code in row["codes"])
            if None in fields:  # not an AI Hub photo
                continue
            groups.add(prefix if len(row["codes"]) > 1 else prefix + self._group_label(fields))
        _, first, inverse = np.unique(self.group, return_index=True, return_inverse=True)
        return np.array([self.group_name(photo) not in groups for photo in first])[inverse]

    def sample(
        self,
        allowed: np.ndarray,
        *,
        num_photos: int | None,
        num_classes: int | None,
        combination_fraction: float,
        val_fraction: float,
        min_photos_per_class: int,
        seed: int,
    ) -> Sample:
        """Choose classes and photos among the `allowed` (bool mask) and split them. See sampling.py and split.py."""
        per_prefix = np.bincount(self.prefix[allowed], minlength=len(self.prefixes))
        single_counts = np.zeros(len(self.codes), dtype=np.int64)
        total_counts = np.zeros(len(self.codes), dtype=np.int64)
        for prefix, codes in enumerate(self.prefix_codes):
            total_counts[codes] += per_prefix[prefix]
            if len(codes) == 1:
                single_counts[codes] += per_prefix[prefix]
        combinations = np.flatnonzero(self.is_combination)
        code_hashes = sampling.name_hashes(self.codes, seed, "class")
        classes = sampling.choose_classes(
            single_counts,
            total_counts,
            [self.prefix_codes[i] for i in combinations],
            per_prefix[combinations],
            code_hashes,
            num_classes=num_classes,
            num_photos=num_photos,
            combination_fraction=combination_fraction,
            min_photos_per_class=min_photos_per_class,
        )
        prefix_class = np.array([-1 if len(codes) > 1 else codes[0] for codes in self.prefix_codes], dtype=np.int64)
        photo_hashes = sampling.mix(
            sampling.name_hashes(self.prefixes, seed, "photo")[self.prefix],
            sampling.name_hashes(self.view_stems, seed, "view")[self.view],
        )
        photos = sampling.choose_photos(
            prefix_class[self.prefix],
            self._shows_only(classes)[self.prefix] & allowed,
            photo_hashes,
            classes,
            code_hashes[classes],
            num_photos=num_photos,
            combination_fraction=combination_fraction,
        )
        is_val = self._split(photos, val_fraction, seed)
        trained = [self.prefix_codes[prefix] for prefix in np.unique(self.prefix[photos[~is_val]])]
        learnable = np.unique(np.concatenate(trained)) if trained else np.zeros(0, dtype=np.int64)
        kept = self._shows_only(learnable)[self.prefix[photos]]
        too_few = [self.codes[i] for i in np.flatnonzero(total_counts < min_photos_per_class)]
        return Sample(photos[kept], is_val[kept], too_few, int((~kept).sum()))

    def _shows_only(self, classes: np.ndarray) -> np.ndarray:
        """True for prefixes with all codes in `classes`."""
        known = np.zeros(len(self.codes), dtype=bool)
        known[classes] = True
        return np.array([known[codes].all() for codes in self.prefix_codes])

    def _split(self, photos: np.ndarray, val_fraction: float, seed: int) -> np.ndarray:
        is_val = np.zeros(len(photos), dtype=bool)
        if not len(photos):
            return is_val
        prefix = self.prefix[photos]
        single = ~self.is_combination[prefix]
        _, first, group = np.unique(self.group[photos], return_index=True, return_inverse=True)
        names = [self.group_name(photo) for photo in photos[first]]
        hashes = sampling.name_hashes(names, seed, "split")
        is_val[single] = split.split_single(prefix[single], group[single], hashes, val_fraction)
        in_train = Counter(self.prefixes[index] for index in prefix[single & ~is_val].tolist())
        sizes = Counter(names[index] for index in group[~single].tolist())
        order = sorted(set(group[~single].tolist()), key=lambda index: (hashes[index], names[index]))
        groups = {names[index]: (sizes[names[index]], set(split_codes(names[index]))) for index in order}
        chosen = split.split_combinations(groups, val_fraction, in_train)
        is_val[~single] = [names[index] in chosen for index in group[~single].tolist()]
        return is_val
