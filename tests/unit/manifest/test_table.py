from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pillsnap.errors import UserError
from pillsnap.manifest.table import (  # fmt: skip
    SCHEMA,
    ClassInfo,
    class_list,
    manifest_hash,
    neutralise,
    read_classes,
    read_manifest,
    restore,
    write_manifest,
)


def row(sample_id: str, split: str = "train", **change: object) -> dict:
    return {
        "sample_id": sample_id, "image_path": f"a/{sample_id}.png", "image_type": "single", "codes": ["K-000001"],
        "boxes": [[1, 2, 3, 4]], "width": 5, "height": 6, "group": "g", "split": split, "source": "test",
    } | change  # fmt: skip


def table(*rows: dict) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=SCHEMA)


def test_round_trip(tmp_path: Path) -> None:
    pair = row("b", image_type="combination", codes=["K-000002", "K-000001"], boxes=[None, [0.5, 0, 1, 1]])
    written = table(row("a"), pair, row("c", "val"))
    classes = class_list(written, {"K-000001": "약"}, {"K-000001": ["1", "2"]})
    path = write_manifest(written, tmp_path / "out", classes)
    assert path == tmp_path / "out/manifest.parquet"
    for where in (path, tmp_path / "out"):
        again = read_manifest(where)
        assert again.drop_columns("location").equals(written)
        assert again["location"].equals(written["image_path"])  # no photo is in an archive
    assert read_classes(tmp_path / "out") == [
        ClassInfo("K-000001", 0, "약", ["1", "2"], 2, 1),
        ClassInfo("K-000002", 1, "", [], 1, 0),
    ]
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "classes.json", "manifest.parquet", "manifest_train.csv", "manifest_val.csv",
    ]  # fmt: skip


def test_csv_has_the_columns_that_older_tools_expect(tmp_path: Path) -> None:
    written = table(row("a", codes=["K-000114"]), row("b", codes=["NA", "x"], boxes=[None, None]), row("c", "val"))
    write_manifest(written, tmp_path, [])
    with (tmp_path / "manifest_train.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [line["mapping_code"] for line in lines] == ["K-000114", "NA"]
    assert [line["codes"] for line in lines] == ["K-000114", "NA|x"]
    assert list(lines[0])[:4] == ["image_path", "mapping_code", "image_type", "source"]
    assert len((tmp_path / "manifest_val.csv").read_text().splitlines()) == 2


def test_equal_tables_give_equal_bytes_and_one_hash(tmp_path: Path) -> None:
    rows = [row(str(i)) for i in range(500)]
    first = write_manifest(table(*rows), tmp_path / "a", [])
    chunks = pa.concat_tables([table(*rows[:123]), table(*rows[123:])])
    second = write_manifest(chunks, tmp_path / "b", [])
    assert first.read_bytes() == second.read_bytes()
    assert manifest_hash(first) == manifest_hash(tmp_path / "b")
    assert len(manifest_hash(first)) == 64


def test_formula_cells_are_neutralised(tmp_path: Path) -> None:
    write_manifest(table(row("a", codes=["=1+1"], image_path="@x/=cmd.png")), tmp_path, [])
    cells = (tmp_path / "manifest_train.csv").read_text().splitlines()[1].split(",")
    assert cells[:2] == ["'@x/=cmd.png", "'=1+1"]


@settings(deadline=None)
@given(st.text())
def test_restore_inverts_neutralise(cell: str) -> None:
    safe = neutralise(cell)
    assert restore(safe) == cell
    assert not safe.startswith(("=", "+", "-", "@", "\t", "\r"))


def test_older_files_without_nullable_columns_are_read(tmp_path: Path) -> None:
    narrow = table(row("a")).select(SCHEMA.names[:10])
    pq.write_table(narrow, tmp_path / "manifest.parquet")
    assert read_manifest(tmp_path).drop_columns("location").schema.equals(SCHEMA)


def test_invalid_files_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such manifest"):
        read_manifest(tmp_path / "x.parquet")
    with pytest.raises(UserError, match="no such manifest"):
        manifest_hash(tmp_path)
    text = tmp_path / "text.parquet"
    text.write_text("image_path,mapping_code\n")
    with pytest.raises(UserError, match="not a readable Parquet"):
        read_manifest(text)
    pq.write_table(pa.table({"image_path": ["a"], "extra": [1]}), tmp_path / "other.parquet")
    with pytest.raises(UserError, match=r"missing columns \['boxes'.*unknown columns \['extra'\]"):
        read_manifest(tmp_path / "other.parquet")
    wrong = table(row("a")).set_column(5, "width", pa.array(["wide"]))
    pq.write_table(wrong, tmp_path / "wrong.parquet")
    with pytest.raises(UserError, match="column 'width' is not int32"):
        read_manifest(tmp_path / "wrong.parquet")


@pytest.mark.parametrize("column", ["sample_id", "image_path", "image_type", "codes", "boxes", "group", "split"])
def test_empty_cells_are_one_line_with_the_row(tmp_path: Path, column: str) -> None:
    pq.write_table(table(row("a"), row("b") | {column: None}), tmp_path / "manifest.parquet")
    with pytest.raises(UserError, match=f"column '{column}' is empty in row 2"):
        read_manifest(tmp_path)


def test_unknown_sizes_are_zero(tmp_path: Path) -> None:
    pq.write_table(table(row("a", width=None), row("b", height=None)), tmp_path / "manifest.parquet")
    assert read_manifest(tmp_path)["width"].to_pylist() == [0, 5]
    assert read_manifest(tmp_path)["height"].to_pylist() == [6, 0]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no photos"),
        ([row("a"), row("a")], "'a' occurs more than once"),
        ([row("a", "holdout")], "holdout"),
        ([row("a", boxes=[])], "row 1 has 1 codes but 0 boxes"),
        ([row("a"), row("b", codes=["x|y"])], "row 2: class"),
        ([row("a", codes=["two\nlines"])], "row 1: class"),
        ([row("a", codes=[""])], "row 1: class"),
    ],
)
def test_invalid_tables_are_not_written(tmp_path: Path, rows: list[dict], message: str) -> None:
    with pytest.raises(UserError, match=message):
        write_manifest(table(*rows), tmp_path, [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text", ["", "[]", '{"classes": [{"code": "a"}]}', '{"classes": [{"code": "a", "index": 1}]}', "\xff"]
)
def test_invalid_class_maps_are_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "classes.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"classes\.json"):
        read_classes(tmp_path)


def test_class_names_round_trip(tmp_path: Path) -> None:
    write_manifest(table(row("a")), tmp_path, [ClassInfo("K-000001", 0, "약 5mg")])
    assert json.loads((tmp_path / "classes.json").read_text(encoding="utf-8"))["classes"][0]["name"] == "약 5mg"
