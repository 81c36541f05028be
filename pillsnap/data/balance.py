"""Rare classes shown more often: a training table in which some samples stand several times."""

from __future__ import annotations

import numpy as np
import pyarrow as pa


def balance_classes(samples: pa.Table, strength: float) -> pa.Table:
    """Repeat samples of rare classes; the commonest class and every sample stay. `samples` has sample_id and label.

    A class of n samples gets m * (n / m) ** (1 - strength) places, m being the commonest's n: 0 changes nothing, 1
    makes all classes equally frequent. A repetition has an id of its own, and so augmentations of its own.
    """
    labels = samples["label"].to_numpy()
    if strength == 0 or not len(labels):
        return samples
    counts = np.bincount(labels)
    most = counts.max()
    places = np.round(most * (counts / most) ** (1 - strength)).astype(np.int64)
    order = np.argsort(labels, kind="stable")
    within = np.empty(len(labels), np.int64)
    within[order] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    base, extra = np.divmod(places[labels], counts[labels])
    copies = base + (within < extra)
    rows = np.repeat(np.arange(len(labels)), copies)
    lap = np.arange(len(rows)) - np.repeat(np.cumsum(copies) - copies, copies)
    ids = samples["sample_id"].take(rows).to_pylist()
    ids = [f"{name}~{number + 1}" if number else name for name, number in zip(ids, lap.tolist(), strict=True)]
    place = samples.column_names.index("sample_id")
    return samples.take(rows).set_column(place, "sample_id", pa.array(ids, pa.string()))
