"""How often drugs are dispensed, from a CSV table."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path

from pillsnap.errors import UserError
from pillsnap.manifest.drug_table import read_drug_table


def read_counts(path: Path, codes: Collection[str]) -> dict[str, float]:
    """Counts by code, from the columns `code` and `count`; codes that are no class count as not covered.

    Raises UserError for a count that is no number of at least 0, a code with two counts, and a table without a count
    above 0 for any of the classes' `codes`.
    """
    counts: dict[str, float] = {}
    for where, code, record in read_drug_table(path, ("count",)).rows:
        try:
            count = float(record["count"].replace(",", ""))
        except ValueError:
            count = math.nan
        if not (math.isfinite(count) and count >= 0):
            raise UserError(f"{where}: the count of {code} is {record['count']!r}, not a number of 0 or more")
        if counts.setdefault(code, count) != count:
            raise UserError(f"{where}: {code} has the count {count:g}, but {counts[code]:g} in a row above; keep one")
    if not any(counts.get(code) for code in codes):
        raise UserError(f"{path}: no class has a count above 0; the classes are like {min(codes)!r}")
    return counts
