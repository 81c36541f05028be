"""Imports CSV manifests of other tools: absolute paths of another disk, one code per combination, any encoding.

Columns `image_path` and `mapping_code` are required; `codes` (joined by `|`), `split`, `group`, `source` and
`sample_id` are optional. Codes and camera fields of an AI Hub file name override the columns.
"""

from __future__ import annotations

import csv
import io
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa

from pillsnap.errors import UserError
from pillsnap.manifest.aihub import label_paths, parse_name, split_codes
from pillsnap.manifest.class_facts import ClassFacts, class_facts
from pillsnap.manifest.formats.folder import stem_of
from pillsnap.manifest.formats.photo import distinct_pills
from pillsnap.manifest.formats.splits import known_split
from pillsnap.manifest.formats.tables import box_columns
from pillsnap.manifest.import_report import REPORT_NAME, Found, Problems, large_losses, write_report
from pillsnap.manifest.label_reading import read_all_labels
from pillsnap.manifest.rows import boxes_and_sizes, of_photo
from pillsnap.manifest.table import (
    CAMERA_FIELDS,
    CODE_SEPARATOR,
    SCHEMA,
    check_code,
    class_list,
    has_control_characters,
    restore,
    write_manifest,
)
from pillsnap.observe.work_progress import Progress, unseen
from pillsnap.photos.files import check_relative

_LAYOUT = re.compile(r"(?:^|/)((?:train|val)/images/(?:single|combination)/.+)", re.DOTALL)
_FOREIGN = re.compile(r"/|[A-Za-z]:[/\\]")


def import_csv(
    source: Path | Sequence[Path],
    out_dir: Path,
    *,
    data_root: Path | None = None,
    strict: bool = False,
    num_workers: int | None = None,
    progress: Progress = unseen,
) -> Path:
    """Turn CSV manifests into one manifest; return the Parquet path.

    `source`: CSV files, or a folder of them. The split is the column `split`, or `train` or `val` in the file name.
    Paths are made relative to `data_root`, where boxes and sizes are read from the AI Hub labels; without it they stay
    unknown. The split is never changed, even where groups leak; oddities are counted and listed in import_report.json.
    Raises UserError, with file and row number, for an unknown encoding, rows of another length, paths outside the data
    root and classes that differ only in their Unicode form.
    """
    if data_root is not None and not Path(data_root).is_dir():
        raise UserError(f"{data_root}: the data root is not a folder; set --data-root or PILLSNAP_DATA_ROOT")
    rows: list[dict] = []
    problems = Problems()
    reroot = _rerooter(data_root)
    for path in _files(source):
        rows += _read_file(path, reroot, problems)
    if not rows:
        raise UserError(f"{source}: the CSV files have no rows")
    _check_spelling(rows)
    _name_samples(rows)
    facts = _add_labels(rows, data_root, num_workers, progress, problems)
    rows.sort(key=lambda row: row["sample_id"])
    for row in rows:
        del row["where"]
        if distinct_pills(zip(row["codes"], row["boxes"], strict=True))[2]:
            problems.add("same_box_two_classes", row["image_path"])
    _list_leaks(rows, problems)
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    found = Found(dict(zip(table["image_path"].to_pylist(), table["split"].to_pylist(), strict=True)))
    warnings = large_losses(table, problems, found)
    write_report(Path(out_dir), table, problems, warnings=warnings)
    if warnings and strict:
        raise UserError(f"{source}: {'; '.join(warnings)} (--strict). {REPORT_NAME} lists them")
    return write_manifest(table, Path(out_dir), class_list(table, facts.names, facts.edi_codes, facts.attributes))


def decode_text(data: bytes, where: str) -> str:
    """Text of a CSV file: UTF-8 with or without BOM, UTF-16 with BOM, or CP949 (Korean spreadsheets)."""
    encodings = ("utf-16",) if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ("utf-8-sig", "cp949")
    for encoding in encodings:
        try:
            return data.decode(encoding)
        except UnicodeDecodeError as error:
            fault = error
    row = data[: fault.start].count(b"\n") + 1
    raise UserError(f"{where}: row {row}: not UTF-8, UTF-16 or CP949 text; save the file as UTF-8")


def _files(source: Path | Sequence[Path]) -> list[Path]:
    if isinstance(source, str | Path):
        source = Path(source)
        if source.is_dir():
            found = sorted(path for path in source.iterdir() if path.suffix.lower() == ".csv")
            if not found:
                raise UserError(f"{source}: no .csv file in this folder")
            return found
        source = [source]
    return [Path(path) for path in source]


def _read_file(path: Path, reroot: Callable[[str], str | None], problems: Problems) -> list[dict]:
    try:
        text = decode_text(path.read_bytes(), str(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    side = _split_of_file(path)
    rows = []
    header: list[str] = []
    number = 1
    try:
        for number, cells in enumerate(reader, start=1):
            where = f"{path}: row {number}"
            if not header:
                header = [cell.strip() for cell in cells]
                _check_header(header, where)
            elif cells:
                if len(cells) != len(header):
                    raise UserError(f"{where}: {len(cells)} cells, but the header has {len(header)}")
                record = dict(zip(header, map(restore, cells), strict=True))
                rows.append(_to_row(record, side, reroot, where, problems))
    except csv.Error as error:
        raise UserError(f"{path}: row {number + 1}: not CSV ({error})") from error
    return rows


def _check_header(header: list[str], where: str) -> None:
    boxes = box_columns([cell.lower() for cell in header])
    if boxes:
        raise UserError(f"{where}: has columns of boxes ({', '.join(boxes)}): import its folder by --format csv-boxes")
    missing = {"image_path", "mapping_code"} - set(header)
    if missing:
        raise UserError(f"{where}: no column {', '.join(sorted(missing))}; found {', '.join(header)[:200]}")
    if len(set(header)) != len(header):
        raise UserError(f"{where}: a column name occurs twice")


def _split_of_file(path: Path) -> str | None:
    words = re.split(r"[^a-z0-9]+", path.stem.lower())
    sides = {known_split(word) for word in words} - {""}
    return sides.pop() if len(sides) == 1 else None


def _to_row(
    record: dict[str, str],
    side: str | None,
    reroot: Callable[[str], str | None],
    where: str,
    problems: Problems,
) -> dict:
    given = record["image_path"]
    path = reroot(given)
    if path is None:
        raise UserError(
            f"{where}: {given!r} is not under the data root and does not contain train/images/; set --data-root"
        )
    if has_control_characters(path):
        raise UserError(f"{where}: the path {given!r} has control characters")
    try:
        check_relative(path)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    split = known_split(record["split"].strip()) if record.get("split") else side
    if not split and record.get("split"):
        raise UserError(f"{where}: neither train, val nor test: the column `split` says {record['split']!r}")
    if not split and "split" in record:
        raise UserError(f"{where}: neither train, val nor test: the column `split` is empty")
    if not split:
        raise UserError(
            f"{where}: neither train, val nor test; add a column `split`, or name the file …_train.csv or …_val.csv"
        )
    name = parse_name(path)
    stem = path.rpartition("/")[2].rpartition(".")[0]
    if name is not None:
        codes = list(name.codes)
        prefix = stem.partition("_")[0]
        group = prefix if len(codes) > 1 else f"{prefix}_{name.direction}_{name.longitude:03d}"
        if record["mapping_code"] not in codes:
            problems.add("mapping_code_not_in_file_name", where)
    else:
        codes = record.get("codes", "").split(CODE_SEPARATOR) if record.get("codes") else [record["mapping_code"]]
        group = record.get("group") or path.rpartition(".")[0]
    for code in codes:
        check_code(code, where)
    return {
        "sample_id": record.get("sample_id") or "",
        "image_path": path,
        "image_type": "combination" if len(codes) > 1 else "single",
        "codes": codes,
        "boxes": [None] * len(codes),
        "width": 0,
        "height": 0,
        "group": group,
        "split": split,
        "source": record.get("source") or "csv",
        "where": where,
        **({} if name is None else {field: getattr(name, field) for field in CAMERA_FIELDS}),
    }


def _rerooter(data_root: Path | None) -> Callable[[str], str | None]:
    """A function: path in the CSV file -> path relative to the data root, or None."""
    root = None if data_root is None else os.path.abspath(data_root)
    has_inner = data_root is not None and not Path(data_root, "train").exists() and Path(data_root, "data").exists()
    cut: list[int] = []

    def reroot(path: str) -> str | None:
        if not _FOREIGN.match(path):
            return path
        path = path.replace("\\", "/") if path[0] != "/" else path
        if root is not None and path.startswith(root + "/"):
            return path[len(root) + 1 :]
        match = _LAYOUT.search(path)
        if match:
            return ("data/" if has_inner else "") + match[1]
        if root is None:
            return None
        # Any other layout: the first file found under the root determines how many leading folders are dropped.
        parts = path.split("/")
        if not cut:
            cut.extend(i for i in range(1, len(parts)) if os.path.isfile("/".join([root, *parts[i:]])))
        return "/".join(parts[cut[0] :]) if cut and len(parts) > cut[0] else None

    return reroot


def _check_spelling(rows: list[dict]) -> None:
    """Hangul in two Unicode forms looks like one class and would train as two."""
    seen: dict[str, str] = {}
    for row in rows:
        for code in row["codes"]:
            other = seen.setdefault(unicodedata.normalize("NFC", code), code)
            if other != code:
                raise UserError(f"{row['where']}: class {code!r} is {other!r} in another Unicode form; use one (NFC)")


def _name_samples(rows: list[dict]) -> None:
    """AI Hub photos are named by their file; where two share a name, and elsewhere, by the path."""
    stems = [row["image_path"].rpartition("/")[2].rpartition(".")[0] for row in rows]
    counts = Counter(stem for row, stem in zip(rows, stems, strict=True) if not row["sample_id"])
    for row, stem in zip(rows, stems, strict=True):
        if not row["sample_id"]:
            is_unique = "state" in row and counts[stem] == 1
            row["sample_id"] = stem if is_unique else row["image_path"].rpartition(".")[0]
    first: dict[str, str] = {}
    for row in rows:
        other = first.setdefault(row["sample_id"], row["where"])
        if other is not row["where"]:
            raise UserError(f"{row['where']}: the same photo as {other}: {row['image_path']}")


def _list_leaks(rows: list[dict], problems: Problems) -> None:
    sides: dict[str, set[str]] = {}
    for row in rows:
        sides.setdefault(row["group"], set()).add(row["split"])
    for group in sorted(group for group, seen in sides.items() if len(seen) > 1):
        problems.add("groups_on_both_sides", group)
    trained = {code for row in rows if row["split"] == "train" for code in row["codes"]}
    for code in sorted({code for row in rows for code in row["codes"]} - trained):
        problems.add("classes_only_in_val", code)


def _add_labels(
    rows: list[dict],
    data_root: Path | None,
    num_workers: int | None,
    progress: Progress,
    problems: Problems,
) -> ClassFacts:
    if data_root is None:
        return ClassFacts()
    for row in rows:
        row["image_path"] = _as_on_disk(Path(data_root), row["image_path"], problems)
    labelled = [row for row in rows if _LAYOUT.match(row["image_path"].removeprefix("data/")) and "state" in row]
    jobs: list[tuple[str, str]] = []
    for row in labelled:
        folder, _, name = row["image_path"].rpartition("/")
        stem = name.rpartition(".")[0]
        prefix = stem.partition("_")[0]
        jobs += zip(label_paths(folder, prefix, stem), split_codes(prefix), strict=True)
    labels = read_all_labels(data_root, jobs, num_workers, progress)
    labels = [of_photo(label, stem_of(path)) for label, (path, _) in zip(labels, jobs, strict=True)]
    for (path, _), label in zip(jobs, labels, strict=True):
        if label.problem:
            problems.add(f"label_{label.problem}", path)
    boxes, sizes = boxes_and_sizes([row["codes"] for row in labelled], labels)
    for row, row_boxes, (width, height) in zip(labelled, boxes, sizes, strict=True):
        row |= {"boxes": row_boxes, "width": width, "height": height}
    facts = class_facts([code for _, code in jobs], labels)
    for conflict in facts.conflicts:
        problems.add("conflicting_attributes", conflict)
    return facts


def _as_on_disk(data_root: Path, path: str, problems: Problems) -> str:
    """The path in the Unicode form that exists on disk; a file that does not exist is listed as missing."""
    for form in (path, unicodedata.normalize("NFC", path), unicodedata.normalize("NFD", path)):
        if os.path.lexists(os.path.join(data_root, form)):
            return form
    problems.add("missing_photo", path)
    return path
