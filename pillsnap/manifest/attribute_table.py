"""Attributes of drugs from a CSV table, which add what labels do not state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pillsnap.errors import UserError
from pillsnap.files import write_json
from pillsnap.manifest.attributes import FIELDS, LENGTHS, known_texts, to_attributes, to_texts
from pillsnap.manifest.drug_table import read_drug_table
from pillsnap.manifest.table import CLASSES_NAME, ClassInfo, classes_payload, read_classes, read_unknown

_OTHERS = ("name", "edi_codes")
COLUMNS = (*_OTHERS, *FIELDS)
_SHOWN = 5


@dataclass(frozen=True)
class AttributeTable:
    """Texts by code and column of a table, and the columns that are not read."""

    path: Path
    rows: dict[str, dict[str, str]]
    unknown_columns: list[str] = field(default_factory=list)


def read_attribute_table(path: Path) -> AttributeTable:
    """Read a CSV table: the column `code` (or `mapping_code`) and any of COLUMNS; an empty cell is an unknown value.

    `colours` are joined by `|`, `edi_codes` by commas, lengths are in mm. Raises UserError for a table that
    `read_drug_table` refuses, a length that is no positive number, and a code with two values of one column.
    """
    table = read_drug_table(path, COLUMNS)
    rows: dict[str, dict[str, str]] = {}
    for where, code, record in table.rows:
        found = _texts(record, where)
        before = rows.setdefault(code, {})
        for name in sorted(set(before) & set(found)):
            if before[name] != found[name]:
                raise UserError(
                    f"{where}: {code} has the {name} {found[name]!r}, but {before[name]!r} in a row above; keep one"
                )
        before |= found
    return AttributeTable(path, rows, table.unknown_columns)


def add_attributes(classes: Sequence[ClassInfo], table: AttributeTable) -> tuple[list[ClassInfo], list[str]]:
    """Classes with the values that they lack, and notes: what was added, what differs, what is not known.

    A value of the classes is kept where the table has another. Raises UserError when no code is that of a class.
    """
    codes = {info.code for info in classes}
    unknown = sorted(set(table.rows) - codes)
    if len(unknown) == len(table.rows):
        raise UserError(
            f"{table.path}: none of {len(unknown):,} codes is a class, such as {unknown[0]!r}; the classes are like "
            f"{min(codes)!r}"
        )
    added, differing, filled = 0, [], []
    for info in classes:
        row = table.rows.get(info.code, {})
        kept = {"name": info.name, "edi_codes": ",".join(info.edi_codes), **to_texts(info.attributes)}
        kept = {name: text for name, text in kept.items() if text}
        differing += [f"{info.code} {name} {text!r}" for name, text in row.items() if kept.get(name, text) != text]
        new = {name: text for name, text in row.items() if name not in kept}
        added += len(new)
        filled.append(_with_values(info, kept | new) if new else info)
    notes = [f"attributes added from {table.path.name}: {added:,} values"]
    if table.unknown_columns:
        notes.append(f"columns not read: {', '.join(table.unknown_columns)}; known are {', '.join(COLUMNS)}")
    if unknown:
        notes.append(f"codes of no class: {len(unknown):,} ({', '.join(unknown[:_SHOWN])})")
    if differing:
        notes.append(f"values unlike those known, which are kept: {len(differing):,}, the first {differing[0]}")
    return filled, notes


def add_to_manifest(folder: Path, table: AttributeTable) -> list[str]:
    """Rewrite classes.json of the manifest in `folder` with the attributes of `table`; returns the notes."""
    classes, notes = add_attributes(read_classes(folder), table)
    write_json(folder / CLASSES_NAME, classes_payload(classes, read_unknown(folder)))
    return notes


def _texts(record: Mapping[str, str], where: str) -> dict[str, str]:
    texts = dict(known_texts((name, record[name]) for name in FIELDS if name in record))
    for name in LENGTHS:
        if record.get(name, "").strip() not in ("", "-") and name not in texts:
            raise UserError(f"{where}: {name} is {record[name]!r}, not a length in mm")
    if name := " ".join(record.get("name", "").split()):
        texts["name"] = name
    if codes := sorted({part.strip() for part in record.get("edi_codes", "").split(",")} - {""}):
        texts["edi_codes"] = ",".join(codes)
    return texts


def _with_values(info: ClassInfo, texts: Mapping[str, str]) -> ClassInfo:
    return replace(
        info,
        name=texts.get("name", ""),
        edi_codes=texts.get("edi_codes", "").split(",") if texts.get("edi_codes") else [],
        attributes=to_attributes((name, texts[name]) for name in FIELDS if name in texts),
    )
