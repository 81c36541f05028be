from __future__ import annotations

import numpy as np
import pyarrow as pa

from pillsnap.data.samples import balance_classes


def table(counts: list[int]) -> pa.Table:
    labels = np.repeat(np.arange(len(counts)), counts)
    labels = np.random.default_rng(0).permutation(labels)
    return pa.table({"sample_id": [f"s{i}" for i in range(len(labels))], "label": labels})


def test_class_counts_by_strength() -> None:
    samples = table([100, 25, 4, 1])
    counted = {s: np.bincount(balance_classes(samples, s)["label"].to_numpy()).tolist() for s in (0.0, 0.5, 1.0)}
    assert counted == {0.0: [100, 25, 4, 1], 0.5: [100, 50, 20, 10], 1.0: [100, 100, 100, 100]}


def test_every_sample_is_kept_and_repetitions_have_their_own_ids() -> None:
    samples = table([7, 3])
    balanced = balance_classes(samples, 1.0)
    ids = balanced["sample_id"].to_pylist()
    assert len(set(ids)) == len(ids) == 14
    assert set(samples["sample_id"].to_pylist()) <= set(ids)
    label_of = dict(zip(samples["sample_id"].to_pylist(), samples["label"].to_pylist(), strict=True))
    for name, label in zip(ids, balanced["label"].to_pylist(), strict=True):
        assert label_of[name.split("~")[0]] == label
    uses = np.unique([name.split("~")[0] for name in ids], return_counts=True)[1]
    assert uses.max() - uses.min() <= 2 and uses.max() == 3  # 7 rows of 3 samples: 3, 2 and 2
    assert balance_classes(samples, 1.0).equals(balanced)
