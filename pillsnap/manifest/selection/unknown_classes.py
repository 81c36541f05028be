"""Leaves classes out of training: their photos of one pill judge whether an evaluation says `unknown`."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pillsnap.manifest.selection.sampling import name_hashes


def choose_unknown(table: pa.Table, share: float, seed: int) -> list[str]:
    """Codes to leave out, sorted: `share` of the classes with training photos, rounded, by hash; those without a photo
    of one pill are never chosen.
    """
    trained = _codes(table, pc.equal(table["split"], "train"))
    single = sorted(trained & _codes(table, pc.equal(table["image_type"], "single")))
    order = np.argsort(name_hashes(single, seed, "unknown"), kind="stable")
    return sorted(single[i] for i in order[: round(share * len(trained))])


def leave_out(table: pa.Table, unknown: Iterable[str]) -> pa.Table:
    """The manifest with the photos of one pill of `unknown` codes in validation.

    Photos that show them beside other pills are left out, and then validation photos of codes that lost their last
    training photo. The order of the rows stays.
    """
    unknown = set(unknown)
    shown = [unknown.intersection(codes) for codes in table["codes"].to_pylist()]
    single = pc.equal(table["image_type"], "single").to_pylist()
    alone = [bool(found) and is_single for found, is_single in zip(shown, single, strict=True)]
    splits = ["val" if moved else split for moved, split in zip(alone, table["split"].to_pylist(), strict=True)]
    table = table.set_column(table.column_names.index("split"), "split", pa.array(splits, pa.string()))
    table = table.filter(pa.array([moved or not found for moved, found in zip(alone, shown, strict=True)]))
    named = _codes(table, pc.equal(table["split"], "train")) | unknown
    return table.filter(pa.array([named.issuperset(codes) for codes in table["codes"].to_pylist()]))


def _codes(table: pa.Table, mask: pa.ChunkedArray) -> set[str]:
    return {code for codes in table.filter(mask)["codes"].to_pylist() for code in codes}
