"""Accuracy weighted by how often a drug is dispensed, and by shape, colour and imprint of the drugs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pillsnap.metrics.classification import class_hits, read_crops
from pillsnap.metrics.evidence import known_values

NUM_LOOKS = 10


def weighted_accuracy(table: pa.Table, classes: Sequence[str], counts: Mapping[str, float]) -> dict[str, Any]:
    """Mean over the classes of the share of right answers, weighted by `counts`: `top1`, `top5`.

    `num_classes` have a count and a labelled crop; `covered` is their share of all counts. None without such a class.
    """
    n, first, five = class_hits(read_crops(table), len(classes))
    weights = np.array([counts.get(code, 0.0) for code in classes]) * (n > 0)
    total = float(weights.sum())
    rates = [hits / np.maximum(n, 1) for hits in (first, five)]
    top1, top5 = (float((weights * rate).sum() / total) if total else None for rate in rates)
    return {
        "top1": top1,
        "top5": top5,
        "num_classes": int((weights > 0).sum()),
        "covered": total / sum(counts.values()),
    }


def attribute_accuracy(table: pa.Table, attributes: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Accuracy of the classes by what `attributes` say of them, most labelled crops first.

    `shape` and `colour` have AI Hub's names; a class of two colours counts under both. `imprint` is `both sides`, `one
    side` or `none known`. `look` are the NUM_LOOKS combinations of shape and colours of several classes with most
    wrong answers. Each row has `value`, `num_classes`, `num_samples`, `top1` and `top5`. Empty where nothing is known.
    """
    n, first, five = class_hits(read_crops(table), len(attributes))
    groups: dict[str, dict[str, list[int]]] = {name: {} for name in ("shape", "colour", "imprint", "look")}
    for index, entry in enumerate(attributes):
        if not entry or not n[index]:
            continue
        shape, colours, imprints = (known_values(entry, name) for name in ("shape", "colour", "imprint"))
        values = {"shape": shape, "colour": dict.fromkeys(colours),
                  "imprint": [("none known", "one side", "both sides")[len(imprints)]],
                  "look": [" ".join([*shape, *sorted(colours)])] if shape and colours else []}  # fmt: skip
        for name, names in values.items():
            for value in names:
                groups[name].setdefault(value, []).append(index)

    def rows(found: Mapping[str, list[int]]) -> list[dict[str, Any]]:
        return [
            {"value": value, "num_classes": len(members), "num_samples": int(n[members].sum()),
             "top1": float(first[members].sum() / n[members].sum()),
             "top5": float(five[members].sum() / n[members].sum())}
            for value, members in sorted(found.items(), key=lambda item: (-n[item[1]].sum(), item[0]))
        ]  # fmt: skip

    def wrong(members: list[int]) -> int:
        return int((n - first)[members].sum())

    looks = {value: members for value, members in groups["look"].items() if len(members) > 1 and wrong(members)}
    chosen = sorted(looks, key=lambda value: (-wrong(looks[value]), value))[:NUM_LOOKS]
    groups["look"] = {value: looks[value] for value in chosen}
    return {name: rows(found) for name, found in groups.items() if found}
