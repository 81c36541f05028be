from __future__ import annotations

import csv
import io
import json
import unicodedata
from pathlib import Path
from typing import Any, Literal

import pytest

from pillsnap.errors import UserError
from pillsnap.manifest.build import build_manifest
from pillsnap.manifest.import_csv import import_csv
from pillsnap.manifest.table import read_classes, read_manifest
from tests.unit.conftest import Tree

HOME = "/home/someone/pillsnap_data"
COMBINATION = "K-015280-020014-020238"
HEADER = "image_path,mapping_code,image_type,source\n"

Form = Literal["NFC", "NFD"]


def combination_row(latitude: int = 90, part: int = 7, code: str = "K-015280") -> str:
    name = f"{COMBINATION}_0_2_0_2_{latitude}_000_200.png"
    return f"{HOME}/train/images/combination/TS_{part}_combo/{COMBINATION}/{name},{code},combination,train\n"


def run(tmp_path: Path, text: str | bytes, name: str = "manifest_train.csv", **options: Any) -> list[dict]:
    source = tmp_path / name
    source.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_manifest(import_csv(source, tmp_path / "out", **options)).to_pylist()


def problems(tmp_path: Path) -> dict[str, list[str]]:
    report = json.loads((tmp_path / "out/import_report.json").read_text(encoding="utf-8"))
    return {kind: entry["listed"] for kind, entry in report["problems"].items()}


def test_combination_codes_come_from_the_file_name(tmp_path: Path) -> None:
    (row,) = run(tmp_path, HEADER + combination_row())
    assert row["codes"] == ["K-015280", "K-020014", "K-020238"]
    assert row["boxes"] == [None, None, None]
    assert row["image_path"].startswith("train/images/combination/TS_7_combo/K-015280-020014-020238/K-")
    assert (row["sample_id"], row["group"]) == (f"{COMBINATION}_0_2_0_2_90_000_200", COMBINATION)
    assert (row["image_type"], row["split"], row["source"], row["latitude"]) == ("combination", "train", "train", 90)


def test_mapping_code_that_is_not_in_the_name_is_listed(tmp_path: Path) -> None:
    run(tmp_path, HEADER + combination_row() + combination_row(75, code="K-999999"))
    assert problems(tmp_path) == {"mapping_code_not_in_file_name": [f"{tmp_path}/manifest_train.csv: row 3"]}


def test_two_files_are_two_splits_and_leaks_are_listed(tmp_path: Path) -> None:
    source = tmp_path / "both"
    source.mkdir()
    (source / "manifest_train_combo.csv").write_text(HEADER + combination_row(70) + combination_row(75))
    (source / "manifest_val_combo.csv").write_text(HEADER + combination_row(90))
    table = read_manifest(import_csv(source, tmp_path / "out"))
    assert table["split"].to_pylist() == ["train", "train", "val"]
    assert problems(tmp_path) == {"groups_on_both_sides": [COMBINATION]}
    assert [info.num_val for info in read_classes(tmp_path / "out")] == [1, 1, 1]


def test_equal_names_in_two_folders_are_two_samples(tmp_path: Path) -> None:
    rows = run(tmp_path, HEADER + combination_row(part=1) + combination_row(part=2))
    assert [row["sample_id"].partition("/K-")[0] for row in rows] == [
        "train/images/combination/TS_1_combo",
        "train/images/combination/TS_2_combo",
    ]


def test_boxes_are_read_under_the_data_root(tree: Tree, tmp_path: Path) -> None:
    codes = ["K-015280", "K-020014", "K-020238"]
    boxes = {code: [float(i), 0.0, 5.0, 5.0] for i, code in enumerate(codes)}
    tree.combination(codes, latitude=90, part=7, boxes=boxes, without=["K-020014"])
    (row,) = run(tmp_path, HEADER + combination_row(), data_root=tree.root)
    assert row["boxes"] == [[0, 0, 5, 5], None, [2, 0, 5, 5]]
    assert (row["width"], row["height"]) == (50, 60)
    assert [path.rpartition("/")[0].rpartition("/")[2] for path in problems(tmp_path)["label_missing"]] == ["K-020014"]
    (tree.root / "data").mkdir()
    (tree.root / "train").rename(tree.root / "data/train")
    (again,) = run(tmp_path, HEADER + combination_row(), data_root=tree.root)
    assert again["image_path"] == "data/" + row["image_path"]
    assert again["boxes"] == row["boxes"]


def test_missing_photos_are_listed(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    run(tmp_path, HEADER + combination_row(), data_root=tmp_path / "root")
    assert len(problems(tmp_path)["missing_photo"]) == 1


def test_own_csv_round_trip(tree: Tree, tmp_path: Path) -> None:
    tree.many(4)
    built = build_manifest(tree.root, tmp_path / "built", num_photos=None, num_classes=None)
    imported = import_csv(tmp_path / "built", tmp_path / "out", data_root=tree.root)
    rows = [read_manifest(path).to_pylist() for path in (built.path, imported)]
    assert rows[0] == rows[1]
    for name in ("manifest_train.csv", "manifest_val.csv"):
        assert (tmp_path / "built" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_paths_of_another_layout_are_matched_by_the_files_that_exist(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "pills/a").mkdir(parents=True)
    (root / "pills/a/1.jpg").write_bytes(b"x")
    text = "image_path,mapping_code\n/other/disk/pills/a/1.jpg,007\n/other/disk/pills/a/2.jpg,NA\n"
    rows = run(tmp_path, text, data_root=root)
    assert [(row["image_path"], row["codes"]) for row in rows] == [
        ("pills/a/1.jpg", ["007"]),
        ("pills/a/2.jpg", ["NA"]),
    ]
    windows = "image_path,mapping_code\nD:\\disk\\pills\\a\\1.jpg,007\n"
    assert run(tmp_path, windows, data_root=root)[0]["image_path"] == "pills/a/1.jpg"
    inside = f"image_path,mapping_code\n{root}/pills/a/1.jpg,007\n"
    assert run(tmp_path, inside, data_root=root)[0]["image_path"] == "pills/a/1.jpg"


AWKWARD = [
    "000123",
    "NA",
    "007",
    "null",
    "1e5",
    "=1+1",
    "'=x",
    "@cmd",
    "-3",
    "약 5mg",
    "a, b",
    'say "x"',
    "a\u3000b",
    "+82",
]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp949", "utf-16"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_unusual_class_names_round_trip(tmp_path: Path, encoding: str, line_end: str) -> None:
    from pillsnap.manifest.table import neutralise

    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator=line_end)
    writer.writerow(["image_path", "mapping_code", "split"])
    for i, code in enumerate(AWKWARD):
        for split in ("train", "val"):
            writer.writerow([f"{split}{i:02d}.jpg", neutralise(code), split])
    rows = run(tmp_path, out.getvalue().encode(encoding))
    assert [row["codes"] for row in rows] == [[code] for code in AWKWARD] * 2
    # And once more through the files that the import wrote.
    again = read_manifest(import_csv(tmp_path / "out", tmp_path / "again")).to_pylist()
    assert [(row["sample_id"], row["codes"]) for row in again] == [(row["sample_id"], row["codes"]) for row in rows]
    assert {info.code for info in read_classes(tmp_path / "again")} == set(AWKWARD)


def test_quoted_newlines_do_not_shift_rows(tmp_path: Path) -> None:
    text = 'image_path,mapping_code,source\na.jpg,x,"two\nlines"\nb.jpg,y,one\n'
    rows = run(tmp_path, text)
    assert [(row["codes"], row["source"]) for row in rows] == [(["x"], "two\nlines"), (["y"], "one")]
    with pytest.raises(UserError, match="row 3: class 'y\\\\nz'"):
        run(tmp_path, 'image_path,mapping_code,source\na.jpg,x,"two\nlines"\nb.jpg,"y\nz",one\n')


def test_hangul_in_two_unicode_forms_is_an_error(tmp_path: Path) -> None:
    nfc, nfd = "약", unicodedata.normalize("NFD", "약")
    assert run(tmp_path, f"image_path,mapping_code\na.jpg,{nfd}\n")[0]["codes"] == [nfd]
    with pytest.raises(UserError, match=r"row 3: class .* in another Unicode form"):
        run(tmp_path, f"image_path,mapping_code\na.jpg,{nfc}\nb.jpg,{nfd}\n")


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_paths_take_the_unicode_form_on_disk(tmp_path: Path, forms: tuple[Form, Form]) -> None:
    on_disk, written = (unicodedata.normalize(form, "약/사진.jpg") for form in forms)
    (tmp_path / "root" / on_disk).parent.mkdir(parents=True)
    (tmp_path / "root" / on_disk).write_bytes(b"x")
    (row,) = run(tmp_path, f"image_path,mapping_code\n{written},x\n", data_root=tmp_path / "root")
    assert row["image_path"] == on_disk
    assert problems(tmp_path) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no rows"),
        (HEADER, "no rows"),
        ("path,code\na,b\n", "row 1: no column image_path, mapping_code"),
        ("image_path,mapping_code,mapping_code\na,b,c\n", "row 1: a column name occurs twice"),
        ("image_path,mapping_code\na.jpg,x\nb.jpg\n", "row 3: 1 cells, but the header has 2"),
        ('image_path,mapping_code\na.jpg,x\nb.jpg,"y\n', "row 3: not CSV"),
        ("image_path,mapping_code\na.jpg,x\na.jpg,x\n", "row 3: the same photo as .*row 2"),
        ("image_path,mapping_code\n../a.jpg,x\n", "row 2: .*not a path beneath the data root"),
        ("image_path,mapping_code\n/etc/passwd,x\n", "row 2: '/etc/passwd' is not under the data root"),
        ("image_path,mapping_code\n/x/train/images/single/../../../y.png,x\n", "row 2: .*not a path beneath"),
        ("image_path,mapping_code\na\0b.jpg,x\n", "row 2: the path .* has control characters"),
        ("image_path,mapping_code\na.jpg,\n", "row 2: class '' is empty"),
        (
            "image_path,mapping_code,split\na.jpg,x,holdout\n",
            "row 2: neither train, val nor test: the column `split` says",
        ),
        (b"image_path,mapping_code\na.jpg,\xff\xff\n", "row 2: not UTF-8, UTF-16 or CP949"),
    ],
)
def test_invalid_files_are_one_line_with_the_row(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        run(tmp_path, text)
    assert "\n" not in str(error.value)


def test_split_must_be_known(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="row 2: neither train, val nor test; add a column"):
        run(tmp_path, "image_path,mapping_code\na.jpg,x\n", name="photos.csv")
    with pytest.raises(UserError, match="the column `split` is empty"):
        run(tmp_path, "image_path,mapping_code,split\na.jpg,x,\n", name="photos.csv")
    for split, known in {"valid": "val", "Test": "test", "train2017": "train"}.items():
        (row,) = run(tmp_path, f"image_path,mapping_code,split\na.jpg,x,{split}\n", name="photos.csv")
        assert row["split"] == known
    with pytest.raises(UserError, match="not a folder"):
        run(tmp_path, HEADER, data_root=tmp_path / "nowhere")
    with pytest.raises(UserError, match="cannot be read"):
        import_csv(tmp_path / "nowhere.csv", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no \.csv file"):
        import_csv(tmp_path / "empty", tmp_path / "out")


def test_pills_with_one_box_are_a_finding(tree: Tree, tmp_path: Path) -> None:
    codes = ["K-015280", "K-020014", "K-020238"]
    boxes = {code: [float(code == "K-020238"), 0.0, 5.0, 5.0] for code in codes}
    tree.combination(codes, latitude=90, part=7, boxes=boxes)
    (row,) = run(tmp_path, HEADER + combination_row(), data_root=tree.root)
    assert problems(tmp_path) == {"same_box_two_classes": [row["image_path"]]}
