from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from pillsnap.errors import UserError
from pillsnap.manifest.formats.names import read_names
from pillsnap.manifest.import_folder import ImportOptions, import_folder
from pillsnap.manifest.table import read_classes, read_manifest


def photo(path: Path, label: str | None, size: tuple[int, int] = (100, 200)) -> None:
    """`path` is …/images/…/x.jpg; `size` = (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.zeros((size[1], size[0], 3), np.uint8))
    if label is not None:
        target = Path(str(path).replace("/images", "/labels")).with_suffix(".txt")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(label)


def run(root: Path, names: Any, **options: Any) -> list[dict[str, Any]]:
    """Rows of the manifest of `root`; a validation photo is added where it has none."""
    if (root / "images/train").is_dir() and not (root / "images/val").is_dir():
        photo(root / "images/val/added.jpg", "")
    path = import_folder(root, root.parent / "out", ImportOptions(names, **options))
    return [row for row in read_manifest(path).to_pylist() if "added" not in row["image_path"]]


@pytest.mark.parametrize("pattern", ["images/{split}", "{split}/images"])
def test_both_layouts(tmp_path: Path, pattern: str) -> None:
    root = tmp_path / "set"
    photo(root / pattern.format(split="train") / "a.jpg", "1 0.5 0.5 0.2 0.1\n0 0.25 0.25 0.1 0.1\n")
    photo(root / pattern.format(split="valid") / "b.png", "0 0.5 0.5 1 1")
    photo(root / pattern.format(split="test") / "c.jpg", "")
    rows = {row["image_path"].rpartition("/")[2]: row for row in run(root, ["advil", "tylenol"])}
    assert rows["a.jpg"]["codes"] == ["tylenol", "advil"]
    assert rows["a.jpg"]["boxes"] == [pytest.approx([40, 90, 20, 20]), pytest.approx([20, 40, 10, 20])]
    assert (rows["a.jpg"]["width"], rows["a.jpg"]["height"]) == (100, 200)
    assert [rows[name]["image_type"] for name in ("a.jpg", "b.png", "c.jpg")] == ["combination", "single", "single"]
    assert [rows[name]["split"] for name in ("a.jpg", "b.png", "c.jpg")] == ["train", "val", "test"]
    assert rows["b.png"]["source"] == "yolo/valid"
    assert rows["c.jpg"]["codes"] == []
    assert rows["a.jpg"]["sample_id"] + ".jpg" == rows["a.jpg"]["image_path"]
    assert (root / rows["a.jpg"]["image_path"]).is_file()
    assert [(info.code, info.name, info.num_train, info.num_val) for info in read_classes(tmp_path / "out")] == [
        ("advil", "advil", 1, 1),
        ("tylenol", "tylenol", 1, 0),
    ]


def test_polygon_gives_its_bounding_box(tmp_path: Path) -> None:
    photo(tmp_path / "set/images/train/a.jpg", "0 0.1 0.1 0.3 0.2 0.2 0.5")
    (row,) = run(tmp_path / "set", ["x"], labels="polygons")
    assert row["boxes"][0] == pytest.approx([10, 20, 20, 80])


def test_photo_without_a_label_file_is_left_out_and_listed(tmp_path: Path) -> None:
    photo(tmp_path / "set/images/train/a.jpg", "0 0.5 0.5 0.2 0.1")
    photo(tmp_path / "set/images/train/b.jpg", None)
    (tmp_path / "set/images/train/c.jpg").write_bytes(b"not a photo")
    (tmp_path / "set/images/train/d.jpg").write_bytes(b"")
    assert len(run(tmp_path / "set", ["x"])) == 1
    problems = json.loads((tmp_path / "out/import_report.json").read_text())["problems"]
    assert {kind: entry["listed"] for kind, entry in problems.items()} == {
        "empty_label_file": ["labels/val/added.txt"],
        "no_label_file": ["images/train/b.jpg"],
        "not_an_image": ["images/train/c.jpg"],
        "empty": ["images/train/d.jpg"],
    }


def test_exif_rotated_photo_has_its_upright_size(tmp_path: Path) -> None:
    from PIL import Image

    photo(tmp_path / "set/images/train/a.jpg", "0 0.5 0.5 0.2 0.1")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (100, 200)).save(tmp_path / "set/images/train/a.jpg", exif=exif)
    (row,) = run(tmp_path / "set", ["x"])
    assert (row["width"], row["height"]) == (200, 100)
    assert row["boxes"][0] == pytest.approx([80, 45, 40, 10])


def test_groups_by_regular_expression(tmp_path: Path) -> None:
    for name in ("p1.rf.aa", "p1.rf.bb", "p2.rf.cc"):
        photo(tmp_path / f"set/images/train/{name}.jpg", "0 0.5 0.5 0.2 0.1")
    for pattern in (r"^(.*)\.rf\.", r"^p\d"):
        assert sorted(row["group"] for row in run(tmp_path / "set", ["x"], group_by=pattern)) == ["p1", "p1", "p2"]


def test_group_in_both_splits_is_an_error_that_names_it(tmp_path: Path) -> None:
    photo(tmp_path / "set/images/train/p1.rf.aa.jpg", "0 0.5 0.5 0.2 0.1")
    photo(tmp_path / "set/images/val/p1.rf.bb.jpg", "0 0.5 0.5 0.2 0.1")
    with pytest.raises(UserError, match=r"1 groups are in train and in val \(p1"):
        run(tmp_path / "set", ["x"], group_by=r"^(.*)\.rf\.")


def test_class_seen_only_in_validation_is_left_out_and_listed(tmp_path: Path) -> None:
    photo(tmp_path / "set/images/train/a.jpg", "0 0.5 0.5 0.2 0.1")
    photo(tmp_path / "set/images/val/b.jpg", "1 0.5 0.5 0.2 0.1")
    photo(tmp_path / "set/images/val/c.jpg", "0 0.5 0.5 0.2 0.1")
    assert [row["codes"] for row in run(tmp_path / "set", ["x", "y"])] == [["x"], ["x"]]
    report = json.loads((tmp_path / "out/import_report.json").read_text())
    assert report["problems"]["class_only_in_validation"]["listed"] == ["images/val/b.jpg"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("3 0.5 0.5 0.1 0.1", "line 1: class index 3, but --names has 2"),
        ("0 0.5 0.5 0.1 0.1\n0 0.5 x 0.1 0.1", "line 2: not numbers"),
        ("0 0.5 0.5 0.1", "expected `class cx cy w h`"),
        ("0 0.5 0.5 0 0.1", "is empty or not normalised"),
        ("0 50 50 10 10", "is empty or not normalised"),
        ("0 0.5 nan 0.1 0.1", "not finite"),
    ],
)
def test_malformed_label_lines_name_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    photo(tmp_path / "set/images/train/a.jpg", line)
    with pytest.raises(UserError, match=message) as error:
        run(tmp_path / "set", ["x", "y"])
    assert "a.txt" in str(error.value)


def test_names_in_every_form(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_bytes("\ufeff007\r\nNA\r\nflatugel 6\r\n".encode())
    (tmp_path / "list.yaml").write_text("names: ['007', NA, flatugel 6]\n")
    (tmp_path / "map.yaml").write_text("names:\n  0: '007'\n  1: NA\n  2: flatugel 6\n")
    expected = ["007", "NA", "flatugel 6"]
    for names in (tmp_path / "names.txt", str(tmp_path / "list.yaml"), tmp_path / "map.yaml", "007, NA,flatugel 6"):
        assert read_names(names) == expected
    assert read_names(expected) == expected


@pytest.mark.parametrize("names", ["", "a,a", "a,,b", ["a|b", "a-b"], ["\u00e9", "e\u0301"], ["a\nb"]])
def test_invalid_names_are_one_line(names: Any) -> None:
    with pytest.raises(UserError):
        read_names(names)


def test_invalid_names_files_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("names: [a\n")
    (tmp_path / "none.yaml").write_text("nc: 2\n")
    (tmp_path / "gap.yaml").write_text("names: {0: a, 2: b}\n")
    for name, message in (("bad", "not valid YAML"), ("none", "no `names`"), ("gap", "not 0 to 1")):
        with pytest.raises(UserError, match=message):
            read_names(tmp_path / f"{name}.yaml")
    with pytest.raises(UserError, match="cannot read class names"):
        read_names(tmp_path / "missing.txt")


def test_missing_and_foreign_folders_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        run(tmp_path / "nowhere", ["x"])
    with pytest.raises(UserError, match=r"no photos \(\.jpg"):
        run(tmp_path, ["x"])
    photo(tmp_path / "set/images/train/a.jpg", "0 0.5 0.5 0.2 0.1")
    with pytest.raises(UserError, match="not a regular expression"):
        run(tmp_path / "set", ["x"], group_by="(")
