"""The manifest: a Parquet table with one row per photo, plus two CSV files and classes.json."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pillsnap.errors import UserError
from pillsnap.files import write_atomically, write_json
from pillsnap.manifest.attributes import Attributes, to_attributes, to_texts
from pillsnap.photos.archives import Place, to_location

PARQUET_NAME = "manifest.parquet"
CLASSES_NAME = "classes.json"
SPLITS = ("train", "val", "test")
"""`test` is never trained on or validated with; `evaluate --split test` evaluates it."""
CSV_NAMES = {"train": "manifest_train.csv", "val": "manifest_val.csv", "test": "manifest_test.csv"}
CSV_COLUMNS = ("image_path", "mapping_code", "image_type", "source", "sample_id", "codes", "group")
CODE_SEPARATOR = "|"
CAMERA_FIELDS = ("state", "background", "direction", "light", "latitude", "longitude", "size")

SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("image_path", pa.string()),
        ("image_type", pa.string()),
        ("codes", pa.list_(pa.string())),
        ("boxes", pa.list_(pa.list_(pa.float32()))),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("group", pa.string()),
        ("split", pa.string()),
        ("source", pa.string()),
        *((name, pa.int16()) for name in CAMERA_FIELDS),
        # Position of a photo in a ZIP archive; null for a plain file.
        ("archive", pa.string()),
        ("member", pa.string()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("compression", pa.int16()),
    ]
)
_REQUIRED = set(SCHEMA.names[:10])
_NEVER_NULL = {"sample_id", "image_path", "image_type", "codes", "boxes", "group", "split"}
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_FORMULA = re.compile(r"^'*[=+\-@\t\r\uff0b\uff0d\uff1d\uff20]")


@dataclass(frozen=True)
class ClassInfo:
    """One class of the classifier: its K-code (or class name), index, Korean EDI codes, photo counts and attributes."""

    code: str
    index: int
    name: str = ""
    edi_codes: list[str] = field(default_factory=list)
    num_train: int = 0
    num_val: int = 0
    attributes: Attributes = field(default_factory=Attributes)

    def __post_init__(self) -> None:
        known = isinstance(self.attributes, dict) and to_attributes(to_texts(self.attributes).items())
        if known != self.attributes:
            raise TypeError(f"attributes of class {self.code!r} of an unknown name, type or spelling")

    def to_dict(self) -> dict[str, Any]:
        """Its entry in classes.json; without known attributes that of earlier versions."""
        entry = asdict(self)
        if not self.attributes:
            del entry["attributes"]
        return entry


def read_manifest(path: Path) -> pa.Table:
    """Read a manifest, given its Parquet file or the directory of `manifest.parquet`.

    Columns are in SCHEMA order; nullable columns that are missing in an older file are null. The column `location` is
    added (see `with_locations`).
    Raises UserError when the file is missing, is no Parquet, or has other columns or types; PermissionError when it
    must not be read.
    """
    path = _parquet_path(path)
    try:
        with path.open("rb") as file:
            table = pq.read_table(file)
    except PermissionError:
        raise
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet manifest ({_one_line(error)}); build it again") from error
    return with_locations(_conform(table, str(path)))


def with_locations(table: pa.Table) -> pa.Table:
    """Add the column `location`: what the readers of photos take (see photos/archives.py). It is not written to files.

    For photos that are plain files it shares the memory of `image_path`.
    """
    if "archive" not in table.column_names or table["archive"].null_count == table.num_rows:
        return table.append_column("location", table["image_path"])
    columns = (table[name].to_pylist() for name in ("image_path", "archive", "offset", "length", "compression"))
    locations = [
        path if archive is None else to_location(Place(archive, offset, length, compression))
        for path, archive, offset, length, compression in zip(*columns, strict=True)
    ]
    return table.append_column("location", pa.array(locations, pa.string()))


def write_manifest(table: pa.Table, out_dir: Path, classes: list[ClassInfo], unknown: Iterable[str] = ()) -> Path:
    """Write manifest.parquet, manifest_train.csv, manifest_val.csv and classes.json; return the Parquet path. With
    photos of the split `test` also manifest_test.csv. `unknown`: codes left out of training.

    Files are replaced atomically, the Parquet file last: if it exists, the set is complete. Equal tables give equal
    bytes. Raises UserError for duplicate sample ids and for codes that a CSV cell cannot hold.
    """
    if "location" in table.column_names:  # of `read_manifest`: what it reads can be written
        table = table.drop_columns(["location"])
    table = _conform(table, "manifest")
    if table.num_rows == 0:
        raise UserError("manifest: no photos to write; check the data root and the sampling settings")
    _check_rows(table)
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    has_test = "test" in table["split"].to_pylist()
    for split, name in CSV_NAMES.items():
        if split == "test" and not has_test:
            (out_dir / name).unlink(missing_ok=True)  # of an earlier manifest
        else:
            write_atomically(out_dir / name, _csv_text(table, split).encode("utf-8"))
    write_json(out_dir / CLASSES_NAME, classes_payload(classes, unknown))
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", row_group_size=50_000)
    write_atomically(out_dir / PARQUET_NAME, buffer.getbuffer())
    return out_dir / PARQUET_NAME


def manifest_hash(path: Path) -> str:
    """sha256 (hex) of the Parquet file; UserError when it is missing."""
    digest = hashlib.sha256()
    with _parquet_path(path).open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def classes_payload(classes: Iterable[ClassInfo], unknown: Iterable[str] = ()) -> dict[str, Any]:
    """Content of classes.json; `unknown_classes` only if there are any."""
    payload: dict[str, Any] = {"schema_version": 1, "classes": [info.to_dict() for info in classes]}
    return payload | ({"unknown_classes": left_out} if (left_out := list(unknown)) else {})


def read_unknown(path: Path) -> list[str]:
    """Codes that classes.json, given the file or its directory, lists as left out of training; it was read before."""
    path = Path(path)
    text = (path / CLASSES_NAME if path.is_dir() else path).read_text(encoding="utf-8")
    return list(json.loads(text).get("unknown_classes", ()))


def read_classes(path: Path) -> list[ClassInfo]:
    """Read classes.json, given the file or its directory; sorted by index. UserError when invalid."""
    path = Path(path)
    if path.is_dir():
        path = path / CLASSES_NAME
    try:
        payload = json.loads(path.read_text(encoding="utf-8"))
        classes = [ClassInfo(**entry) for entry in payload["classes"]]
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; `pillsnap manifest build` writes it next to the manifest") from error
    except (UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a class map ({_one_line(error)}); build the manifest again") from error
    classes.sort(key=lambda info: info.index)
    if [info.index for info in classes] != list(range(len(classes))):
        raise UserError(f"{path}: class indices are not 0 to {len(classes) - 1}; build the manifest again")
    return classes


def class_list(
    table: pa.Table,
    names: Mapping[str, str] | None = None,
    edi_codes: Mapping[str, Iterable[str]] | None = None,
    attributes: Mapping[str, Attributes] | None = None,
) -> list[ClassInfo]:
    """Classes of a table: index = position among the sorted codes that occur in training photos."""
    counts: dict[str, dict[str, int]] = {split: {} for split in SPLITS}
    for codes, split in zip(table["codes"].to_pylist(), table["split"].to_pylist(), strict=True):
        for code in set(codes):
            counts[split][code] = counts[split].get(code, 0) + 1
    return [
        ClassInfo(
            code=code,
            index=index,
            name=(names or {}).get(code, ""),
            edi_codes=list((edi_codes or {}).get(code, ())),
            num_train=counts["train"][code],
            num_val=counts["val"].get(code, 0),
            attributes=(attributes or {}).get(code, Attributes()),
        )
        for index, code in enumerate(sorted(counts["train"]))
    ]


def neutralise(cell: str) -> str:
    """Quote a CSV cell that a spreadsheet would evaluate as a formula; `restore` is the exact inverse."""
    return "'" + cell if _FORMULA.match(cell) else cell


def restore(cell: str) -> str:
    """Undo `neutralise`."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def _parquet_path(path: Path) -> Path:
    path = Path(path)
    if path.is_dir():
        path = path / PARQUET_NAME
    if not path.is_file():
        raise UserError(f"{path}: no such manifest; make one with `pillsnap manifest build` or `manifest import`")
    return path


def _conform(table: pa.Table, where: str) -> pa.Table:
    missing = sorted(_REQUIRED - set(table.column_names))
    unknown = sorted(set(table.column_names) - set(SCHEMA.names))
    if missing or unknown:
        raise UserError(f"{where}: not a PillSnap manifest (missing columns {missing}, unknown columns {unknown})")
    columns = []
    for column in SCHEMA:
        if column.name not in table.column_names:
            columns.append(pa.nulls(table.num_rows, column.type))
            continue
        try:
            columns.append(table[column.name].cast(column.type))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise UserError(f"{where}: column {column.name!r} is not {column.type} ({_one_line(error)})") from error
        if columns[-1].null_count and column.name in _NEVER_NULL:
            row = columns[-1].is_null().to_pylist().index(True) + 1
            raise UserError(f"{where}: column {column.name!r} is empty in row {row}; build the manifest again")
        if column.name in ("width", "height"):
            columns[-1] = columns[-1].fill_null(0)  # unknown
    return pa.table(columns, schema=SCHEMA)


def _check_rows(table: pa.Table) -> None:
    ids = table["sample_id"].to_pylist()
    if len(set(ids)) != len(ids):
        twice, _ = Counter(ids).most_common(1)[0]
        raise UserError(f"manifest: sample_id {twice!r} occurs more than once; ids must be unique")
    for number, (codes, boxes) in enumerate(
        zip(table["codes"].to_pylist(), table["boxes"].to_pylist(), strict=True), start=1
    ):
        if len(codes) != len(boxes):
            raise UserError(f"manifest: row {number} has {len(codes)} codes but {len(boxes)} boxes (null = unlabelled)")
        for code in codes:
            check_code(code, f"manifest: row {number}")
    wrong = set(table["split"].to_pylist()) - set(SPLITS)
    if wrong:
        raise UserError(f"manifest: split must be train, val or test, found {sorted(map(str, wrong))}")


def has_control_characters(text: str) -> bool:
    """Whether the text has line breaks, other control characters or bytes that are not UTF-8."""
    return _CONTROL.search(text) is not None


def check_code(code: str, where: str) -> None:
    """UserError unless `code` is a non-empty string without control characters or the CSV's code separator."""
    if not code or code != code.strip() or has_control_characters(code) or CODE_SEPARATOR in code:
        raise UserError(
            f"{where}: class {code!r} is empty or has outer spaces, control characters or {CODE_SEPARATOR!r}; rename it"
        )


def _csv_text(table: pa.Table, split: str) -> str:
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    names = ("image_path", "codes", "image_type", "source", "sample_id", "group", "split")
    for path, codes, image_type, source, sample_id, group, row_split in zip(
        *(table[name].to_pylist() for name in names), strict=True
    ):
        if row_split == split:
            cells = (path, codes[0] if codes else "", image_type, source, sample_id, CODE_SEPARATOR.join(codes), group)
            writer.writerow([neutralise(cell or "") for cell in cells])
    return out.getvalue()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
