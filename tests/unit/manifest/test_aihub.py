from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pillsnap.errors import UserError
from pillsnap.manifest import aihub
from pillsnap.manifest import scan as scanning
from tests.unit.conftest import Tree


def test_parse_single_name() -> None:
    name = aihub.parse_name("a/b/K-000114_0_2_1_2_75_260_200.png")
    assert name == aihub.PhotoName(("K-000114",), 0, 2, 1, 2, 75, 260, 200)


def test_parse_combination_name_lists_every_code() -> None:
    name = aihub.parse_name("K-001900-010224-016551-031705_0_2_0_2_70_000_200")
    assert name is not None
    assert name.codes == ("K-001900", "K-010224", "K-016551", "K-031705")
    assert (name.latitude, name.longitude) == (70, 0)


@pytest.mark.parametrize(
    "name",
    [
        "K-000114_index.png",
        "K-000114.png",
        "K-000114_0_2_0_0_75_260.png",
        "000114_0_2_0_0_75_260_200.png",
        "K-_0_2_0_0_75_260_200.png",
        "K-000114_0_2_0_0_75_260_200.json",
        "K-000114_0_2_0_0_75_99999_200.png",
        "",
    ],
)
def test_parse_refuses_other_names(name: str) -> None:
    assert aihub.parse_name(name) is None


def test_label_paths() -> None:
    folder = "data/train/images/single/TS_5_single/K-000114"
    assert aihub.label_paths(folder, "K-000114", "K-000114_x") == [
        "data/train/labels/single/TL_5_single/K-000114_json/K-000114_x.json"
    ]
    folder = "train/images/combination/TS_1_combo/K-000001-000002"
    assert aihub.label_paths(folder, "K-000001-000002", "S") == [
        "train/labels/combination/TL_1_combo/K-000001-000002_json/K-000001/S.json",
        "train/labels/combination/TL_1_combo/K-000001-000002_json/K-000002/S.json",
    ]


def paths(scan: scanning.Scan) -> list[str]:
    return [scan.path(photo) for photo in range(len(scan))]


def test_scan_finds_photos_and_counts_other_entries(tree: Tree) -> None:
    first = tree.single("K-000001")
    second = tree.combination(["K-000001", "K-000002"])
    (second.parent / f"{second.parent.name}_index.png").write_bytes(b"x")
    (second.parent / "Thumbs.db").write_bytes(b"x")
    scan = scanning.scan(tree.root)
    assert paths(scan) == [second.relative_to(tree.root).as_posix(), first.relative_to(tree.root).as_posix()]
    assert scan.stem(1) == "K-000001_0_2_0_0_75_000_200"
    assert scan.refused.counts == {"stray_image": 1, "other_file": 1}


def test_scan_takes_the_codes_from_the_file_name_not_the_folder(tree: Tree) -> None:
    photo = tree.single("K-000001")
    stray = photo.with_name("K-000009_0_2_0_0_75_000_200.png")
    shutil.copy(photo, stray)
    scan = scanning.scan(tree.root)
    assert sorted(scan.prefixes) == ["K-000001", "K-000009"]
    assert sorted(paths(scan)) == sorted(p.relative_to(tree.root).as_posix() for p in (photo, stray))


@pytest.mark.parametrize("num_threads", [1, 3])
def test_scan_is_the_same_with_any_number_of_threads(tree: Tree, num_threads: int) -> None:
    tree.many(4)
    for part in (2, 3):
        tree.single("K-000050", part=part, longitude=part)
    scan = scanning.scan(tree.root, num_threads=num_threads)
    assert paths(scan) == sorted(paths(scan))
    assert len(scan) == 4 * 6 * 4 + 4 * 3 + 2


def test_scan_accepts_a_data_level(tree: Tree) -> None:
    tree.single("K-000001")
    (tree.root / "data").mkdir()
    (tree.root / "train").rename(tree.root / "data/train")
    assert paths(scanning.scan(tree.root)) == [
        "data/train/images/single/TS_1_single/K-000001/K-000001_0_2_0_0_75_000_200.png"
    ]


def test_scan_follows_part_folders_on_other_disks(tree: Tree, tmp_path: Path) -> None:
    tree.single("K-000001")
    part = tree.root / "train/images/single/TS_1_single"
    part.rename(tmp_path / "other_disk")
    part.symlink_to(tmp_path / "other_disk")
    assert len(scanning.scan(tree.root)) == 1


def test_only_the_training_tree_is_scanned_if_there_is_one(tree: Tree) -> None:
    tree.single("K-000001")
    tree.single("K-000002", tree="val")
    assert scanning.scan(tree.root).prefixes == ["K-000001"]


def test_missing_empty_and_foreign_roots_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a folder"):
        scanning.scan(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no AI Hub photos"):
        scanning.scan(tmp_path / "empty")
    (tmp_path / "hollow/train/images/single/TS_1_single/K-000001").mkdir(parents=True)
    with pytest.raises(UserError, match="no photo named like"):
        scanning.scan(tmp_path / "hollow")
