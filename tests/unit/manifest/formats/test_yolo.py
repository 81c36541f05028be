"""Label rows mean what they say, and every label finds its photo or is counted."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pillsnap.errors import UserError
from pillsnap.manifest.formats.label_rows import parse_row
from tests.unit.manifest.formats.conftest import ROW, Load, save_photo, save_text

BOX = "0.5 0.5 0.2 0.1"
POLYGON = "0 0.1 0.1 0.3 0.2 0.2 0.5"
CORNERS = "0 0.1 0.1 0.3 0.1 0.3 0.5 0.1 0.5"
KEY_POINTS = f"0 {BOX} 0.5 0.5 2 0.6 0.6 1"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        save_photo(tmp_path / f"set/images/{split}/a.jpg")
        save_text(tmp_path / f"set/labels/{split}/a.txt", ROW)
    return tmp_path / "set"


@pytest.mark.parametrize(
    ("row", "labels", "key_points", "expected"),
    [
        (ROW, None, False, [40, 90, 20, 20]),
        (POLYGON, "polygons", False, [10, 20, 20, 80]),
        (POLYGON + "\n" + CORNERS, None, False, [10, 20, 20, 80]),
        (CORNERS, "obb", False, [10, 20, 20, 80]),
        (KEY_POINTS, "pose", False, [40, 90, 20, 20]),
        (KEY_POINTS, None, True, [40, 90, 20, 20]),
        (POLYGON, None, None, "say which by --labels"),
        (CORNERS, None, None, "say which by --labels"),
        (KEY_POINTS, None, None, "say which by --labels"),
        (POLYGON, "boxes", False, "expected `class cx cy w h`, got 7"),
        (POLYGON, "obb", False, "or four corners, got 7"),
        (f"0 {BOX} 0.9", None, None, "a sixth field may be a score"),
        (f"0 {BOX} 0.9", "polygons", False, "got 6 fields"),
    ],
)
def test_task_decides_what_a_row_is(
    root: Path, load: Load, row: str, labels: str | None, key_points: bool | None, expected: object
) -> None:
    save_text(root / "labels/train/a.txt", row)
    names: object = ["x"]
    if key_points is not None:
        shape = "kpt_shape: [2, 3]\n" if key_points else ""
        save_text(root / "data.yaml", f"train: images/train\nval: images/val\nnames: [x]\n{shape}")
        names = root / "data.yaml"
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            load(names=names, labels=labels)
    else:
        assert load(names=names, labels=labels).rows["images/train/a.jpg"]["boxes"][0] == pytest.approx(expected)


@settings(deadline=None)
@given(st.integers(0, 9), st.sampled_from(["{}", "{}.0", "{}e0", "+{}", " {}.00"]))
def test_whole_numbers_written_as_floats_are_whole_numbers(index: int, form: str) -> None:
    values = [float(part) for part in f"{form.format(index)} {BOX}".split()]
    assert parse_row(values, "x", 10)[0] == index


@pytest.mark.parametrize("index", [0.5, -1, 10, 1e30])
def test_other_class_indices_are_refused(index: float) -> None:
    with pytest.raises(UserError, match="class index"):
        parse_row([index, 0.5, 0.5, 0.2, 0.1], "x", 10)


def test_repeated_rows_are_dropped_and_two_classes_are_reported(root: Path, load: Load) -> None:
    save_text(root / "labels/train/a.txt", f"0 {BOX}\n0.0 0.50 {BOX[4:]}\n1 {BOX}\n0 0.2 0.2 0.1 0.1\n")
    found = load(names=["x", "y"])
    assert found.rows["images/train/a.jpg"]["codes"] == ["x", "y", "x"]
    assert found.problems["repeated_row"] == ["images/train/a.jpg"]
    assert found.problems["same_box_two_classes"] == ["images/train/a.jpg"]


@pytest.mark.parametrize("name", ["캡슐 사진 1", "écran 2", "a b 3", "약💊4", "100%25"])
@pytest.mark.parametrize("spell", [quote, lambda text: unicodedata.normalize("NFD", text), str, str.strip])
@pytest.mark.parametrize("suffix", [".txt", ".TXT"])
def test_labels_are_found_under_other_spellings(
    root: Path, load: Load, name: str, spell: Callable[[str], str], suffix: str
) -> None:
    save_photo(root / f"images/train/{name}.jpg")
    save_text(root / f"labels/train/{spell(name)}{suffix}", ROW)
    found = load(names=["x"])
    assert set(found.problems) <= {"label_spelled_differently"}
    assert f"images/train/{name}.jpg" in found.rows


def test_everything_left_out_has_its_reason(root: Path, load: Load) -> None:
    save_photo(root / "images/train/unlabelled.jpg")
    save_text(root / "labels/train/orphan.txt", ROW)
    save_photo(root / "images/train/deep/er/b.jpg")
    save_text(root / "labels/train/deep/er/b.txt", "")
    for ending in ("jpg", "png"):
        save_photo(root / f"images/train/twin.{ending}")
    save_text(root / "labels/train/twin.txt", ROW)
    save_text(root / "images/train/notes.md", "x")
    (root / "images/train/link.jpg").symlink_to(root / "images/train/a.jpg")
    (root / "images/train/loop").symlink_to(root / "images")
    (root / "images/train/broken.jpg").write_bytes(b"nothing")
    save_text(root / "labels/train/broken.txt", ROW)
    found = load(names=["x", "y"])
    assert found.rows["images/train/deep/er/b.jpg"]["codes"] == []
    assert found.problems == {
        "classes_without_photo": ["y"],
        "empty_label_file": ["labels/train/deep/er/b.txt"],
        "label_of_two_photos": ["images/train/twin.jpg", "images/train/twin.png"],
        "label_without_photo": ["labels/train/orphan.txt"],
        "link_or_not_a_file": ["images/train/link.jpg", "images/train/loop"],
        "no_label_file": ["images/train/unlabelled.jpg"],
        "not_an_image": ["images/train/broken.jpg"],
        "other_file": ["images/train/notes.md"],
    }
    assert found.report["warnings"] == ["4 of 7 photos are left out", "1 labels have no photo"]


@pytest.mark.parametrize("layout", ["images/{}/a", "{}/a", "deep/{}/a"])
def test_labels_beside_photos(tmp_path: Path, load: Load, layout: str) -> None:
    for split in ("train", "val"):
        save_photo(tmp_path / "set" / f"{layout.format(split)}.jpg")
        save_text(tmp_path / "set" / f"{layout.format(split)}.txt", ROW)
        save_text(tmp_path / "set" / Path(layout.format(split)).parent / "classes.txt", "x\n")
    found = load(names=["x"])
    assert sorted(found.splits.values()) == ["train", "val"]
    assert found.problems == {}


def test_missing_labels_and_missing_photos_have_their_own_message(tmp_path: Path, load: Load) -> None:
    save_photo(tmp_path / "set/images/train/a.jpg")
    with pytest.raises(UserError, match=r"1 photos, but no label file for any of them"):
        load(names=["x"])
    (tmp_path / "set/images/train/a.jpg").unlink()
    with pytest.raises(UserError, match=r"no photos \(\.jpg, \.png"):
        load(names=["x"])
