"""Photos are in the split that a data.yaml or a folder name states, or the import is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from pillsnap.errors import UserError
from tests.unit.manifest.formats.conftest import ROW, Imported, Load, save_photo, save_text

NAMES = ["x"]


def pair(root: Path, photo: str, row: str = ROW) -> None:
    save_photo(root / photo)
    save_text((root / photo.replace("images", "labels")).with_suffix(".txt"), row)


@pytest.mark.parametrize("train", ["train", "Train", "train2017", "training", "TRAINING"])
@pytest.mark.parametrize("val", ["val", "Val", "valid", "validation", "val2017"])
@pytest.mark.parametrize("layout", ["images/{}/a.jpg", "{}/images/a.jpg", "set/{}/images/deep/a.jpg"])
def test_known_folder_names(tmp_path: Path, load: Load, train: str, val: str, layout: str) -> None:
    photos = {layout.format(train): "train", layout.format(val): "val", layout.format("test2017"): "test"}
    for photo in photos:
        pair(tmp_path / "set", photo)
    assert load(names=NAMES).splits == photos


@pytest.mark.parametrize("folder", ["images/holdout", "images/dev", "images/train_old", "fold1/images"])
def test_other_folders_with_labels_are_refused_by_name(tmp_path: Path, load: Load, folder: str) -> None:
    for photo in ("images/train/a.jpg", "images/val/b.jpg", f"{folder}/c.jpg"):
        pair(tmp_path / "set", photo)
    with pytest.raises(UserError, match=f"folders without a split: {folder}"):
        load(names=NAMES)


def test_other_folders_without_labels_are_left_out_and_counted(tmp_path: Path, load: Load) -> None:
    for photo in ("images/train/a.jpg", "images/val/b.jpg"):
        pair(tmp_path / "set", photo)
    save_photo(tmp_path / "set/docs/screenshot.png")
    assert load(names=NAMES).problems == {"folder_without_split": ["docs/screenshot.png"]}


def test_no_split_at_all_needs_a_fraction(tmp_path: Path, load: Load) -> None:
    for number in range(20):
        pair(tmp_path / "set", f"images/p{number // 2}_{number % 2}.jpg")
    with pytest.raises(UserError, match=r"split of 20 photos is not known \(folders: images\).*--val-fraction"):
        load(names=NAMES)
    found = load(names=NAMES, val_fraction=0.2, group_by=r"^(p\d+)")
    assert sorted(found.splits.values()) == ["train"] * 16 + ["val"] * 4
    sides: dict[str, set[str]] = {}
    for row in found.rows.values():
        sides.setdefault(row["group"], set()).add(row["split"])
    assert all(len(seen) == 1 for seen in sides.values())
    assert load(names=NAMES, val_fraction=0.2, group_by=r"^(p\d+)", seed=7).splits != found.splits


def test_a_set_without_validation_photos_is_refused(tmp_path: Path, load: Load) -> None:
    for photo in ("images/train/a.jpg", "images/train/b.jpg", "images/test/c.jpg"):
        pair(tmp_path / "set", photo)
    with pytest.raises(UserError, match=r"no validation photos.*--val-fraction"):
        load(names=NAMES)
    assert sorted(load(names=NAMES, val_fraction=0.5).splits.values()) == ["test", "train", "val"]
    pair(tmp_path / "set", "images/val/d.jpg")
    with pytest.raises(UserError, match="has 1 validation photos: --val-fraction is for sets without any"):
        load(names=NAMES, val_fraction=0.5)


@pytest.mark.parametrize(
    "text",
    [
        "path: .\ntrain: images/a\nval: images/b\ntest: images/c\n",
        "train: ../images/a\nval: ../images/b\ntest: ../images/c\n",
        "path: ../set\ntrain: [images/a]\nval:\n  - images/b\ntest: images/c/\n",
        "path: /content/drive/set\ntrain: images/a\nvalidation: images/b\ntest: images/c\n",
        "train: /content/set/images/a\nval: /content/set/images/b\ntest: /content/set/images/c\n",
        "path: .\ntrain: a.txt\nval: lists/b.txt\ntest: c.txt\n",
    ],
)
@pytest.mark.parametrize("given", [True, False])
def test_data_yaml_says_what_is_what(tmp_path: Path, load: Load, text: str, given: bool) -> None:
    root = tmp_path / "set"
    for folder in "abcd":
        pair(root, f"images/{folder}/1.jpg")
    save_text(root / "a.txt", "./images/a/1.jpg\n")
    save_text(root / "lists/b.txt", "images/b/1.jpg\nimages/b/2.jpg\n")
    save_text(root / "c.txt", "/elsewhere/set/images/c/1.jpg\n")
    save_text(root / "data.yaml", text + "names: [x]\n")
    found: Imported = load(names=root / "data.yaml" if given else None)
    assert found.splits == {"images/a/1.jpg": "train", "images/b/1.jpg": "val", "images/c/1.jpg": "test"}
    assert found.problems["photo_not_listed"] == ["images/d/1.jpg"]
    if "lists" in text:
        assert found.problems["listed_photo_missing"] == ["lists/b.txt: images/b/2.jpg"]


def test_data_yaml_that_fits_nothing_is_refused_when_given(tmp_path: Path, load: Load) -> None:
    root = tmp_path / "set"
    for split in ("train", "val"):
        pair(root, f"images/{split}/a.jpg")
    save_text(root / "data.yaml", "train: images/nowhere\nval: images/val\nnames: [x]\n")
    with pytest.raises(UserError, match="`train: images/nowhere` is no folder or file"):
        load(names=root / "data.yaml")
    found = load(names=["x"])
    assert found.splits == {"images/train/a.jpg": "train", "images/val/a.jpg": "val"}
    assert "splits are those of the folder names" in found.report["notes"][0]
    save_text(root / "data.yaml", "train: images\nval: images/val\nnames: [x]\n")
    with pytest.raises(UserError, match=r"images/val/a\.jpg is in train and in val"):
        load(names=root / "data.yaml")
