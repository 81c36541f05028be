"""Reads CSV tables with one row per drug, by its code."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from pillsnap.errors import UserError
from pillsnap.manifest.import_csv import decode_text

CODE_COLUMNS = ("code", "mapping_code")


@dataclass(frozen=True)
class DrugTable:
    """Rows of a table as (place for messages, code, cells by column), and the columns that are not read."""

    rows: list[tuple[str, str, dict[str, str]]]
    unknown_columns: list[str]


def read_drug_table(path: Path, columns: Collection[str]) -> DrugTable:
    """Read the column `code` (or `mapping_code`) and those of `columns` that there are, at least one.

    UTF-8, UTF-16 with BOM or CP949; column names in capital or small letters. Raises UserError for a missing column,
    rows of another length or without a code, and a table without rows.
    """
    try:
        text = decode_text(path.read_bytes(), str(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name a CSV file") from error
    lines = list(csv.reader(io.StringIO(text, newline="")))
    header = [cell.strip().lower() for cell in lines[0]] if lines else []
    key = next((name for name in CODE_COLUMNS if name in header), "")
    twice = sorted({name for name in header if name and header.count(name) > 1})
    if not key or twice or not set(columns) & set(header):
        wrong = f"the column {twice[0]!r} occurs twice" if twice else f"the columns are {', '.join(header) or 'none'}"
        raise UserError(f"{path}: row 1: {wrong}; expected `code` and some of {', '.join(columns)}")
    rows = []
    for number, cells in enumerate(lines[1:], start=2):
        where = f"{path}: row {number}"
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(header):
            raise UserError(f"{where}: {len(cells)} cells, but the header has {len(header)}")
        record = dict(zip(header, cells, strict=True))
        code = record.pop(key).strip()
        if not code:
            raise UserError(f"{where}: no code; fill in the column `{key}`")
        rows.append((where, code, record))
    if not rows:
        raise UserError(f"{path}: the table has no rows")
    return DrugTable(rows, [name for name in header if name not in (key, *columns)])
