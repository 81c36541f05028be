"""Every way in which AI Hub's photos lie on disks gives the rows of the official tree."""

from __future__ import annotations

import json
import shutil
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pillsnap.errors import UserError
from pillsnap.manifest.build import build_manifest
from pillsnap.manifest.table import read_manifest
from tests.unit.conftest import Tree, label_document

DATA, IMAGES, LABELS = "01.데이터/1.Training", "원천데이터", "라벨링데이터"


def official(tree: Tree) -> list[tuple[str, Path, Path]]:
    """(part such as 1_단일, images, labels) of a tree with two parts of single photos and one of combinations."""
    codes = [f"K-{number:06d}" for number in range(1, 7)]
    for index, code in enumerate(codes):
        for longitude in range(4):
            bbox = [index, longitude, 5, 6]
            tree.single(code, longitude=20 * longitude, part=1 + index % 2, label={"bbox": bbox})
    for latitude in (70, 75):
        tree.combination(codes[:3], latitude=latitude)
        tree.combination(codes[3:], latitude=latitude)
    base = tree.root / "train"
    parts = [("1_단일", "single", "1_single"), ("2_단일", "single", "2_single"), ("1_조합", "combination", "1_combo")]
    return [(name, base / f"images/{kind}/TS_{end}", base / f"labels/{kind}/TL_{end}") for name, kind, end in parts]


def rows(root: Path, out: Path) -> tuple[dict[str, tuple], list[str]]:
    built = build_manifest(root, out, num_photos=None, num_classes=None)
    found = read_manifest(out).to_pylist()
    columns = ("codes", "boxes", "group", "split", "width", "height")
    return {row["sample_id"]: tuple(row[name] for name in columns) for row in found}, built.report["notes"]


def as_delivered(part: str, images: Path, labels: Path, to: Path) -> None:
    shutil.copytree(images, to / DATA / IMAGES / f"TS_{part}")
    shutil.copytree(labels, to / DATA / LABELS / f"TL_{part}")


def decomposed(part: str, images: Path, labels: Path, to: Path) -> None:
    shutil.copytree(images, to / unicodedata.normalize("NFD", f"{DATA}/{IMAGES}/TS_{part}"))
    shutil.copytree(labels, to / f"{DATA}/{LABELS}/TL_{part}")


def without_parts(part: str, images: Path, labels: Path, to: Path) -> None:
    shutil.copytree(images, to / DATA / IMAGES, dirs_exist_ok=True)
    shutil.copytree(labels, to / DATA / LABELS, dirs_exist_ok=True)


def beside_each_other(part: str, images: Path, labels: Path, to: Path) -> None:
    shutil.copytree(images, to / part, dirs_exist_ok=True)
    shutil.copytree(labels, to / part, dirs_exist_ok=True)


def competition(part: str, images: Path, labels: Path, to: Path) -> None:
    shutil.copytree(labels, to / "train_annotations", dirs_exist_ok=True)
    (to / "train_images").mkdir(exist_ok=True)
    for photo in images.rglob("*.png"):
        shutil.copy(photo, to / "train_images")


def zipped_in_folders(part: str, images: Path, labels: Path, to: Path) -> None:
    for kind, folder in (("TS", images), ("TL", labels)):
        archive = to / f"{kind}_{part}" / f"{kind}_{part}.zip"
        archive.parent.mkdir(parents=True)
        with zipfile.ZipFile(archive, "w") as file:
            for path in sorted(folder.rglob("*")):
                file.write(path, path.relative_to(folder))


@pytest.mark.parametrize(
    "move", [as_delivered, decomposed, without_parts, beside_each_other, competition, zipped_in_folders]
)
def test_every_layout_gives_the_same_rows(
    tree: Tree, tmp_path: Path, move: Callable[[str, Path, Path, Path], None]
) -> None:
    parts = official(tree)
    expected, _ = rows(tree.root, tmp_path / "expected")
    for part in parts:
        move(*part, tmp_path / "other")
    found, notes = rows(tmp_path / "other", tmp_path / "out")
    assert found == expected
    assert all(box is not None for row in found.values() for box in row[1])
    assert not [note for note in notes if "label" in note]


def test_photos_of_other_names_are_counted(tree: Tree, tmp_path: Path) -> None:
    for part in official(tree):
        competition(*part, tmp_path / "other")
    (tmp_path / "other/test_images").mkdir()
    for number in range(3):
        (tmp_path / f"other/test_images/{number}.png").write_bytes(b"x")
    _, notes = rows(tmp_path / "other", tmp_path / "out")
    assert "files left out, stray_image: 3, the first test_images/0.png" in notes


def split_file(path: Path) -> None:
    data = path.read_bytes()
    for start in range(0, len(data), len(data) // 3 + 1):
        Path(f"{path}.part{start}").write_bytes(data[start : start + len(data) // 3 + 1])
    path.unlink()


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        (["TS_1_단일", "TS_2_단일", "TS_1_조합"], r"TS_1_단일\.zip and 2 more are still in pieces \(3 files"),
        (
            ["TL_2_단일"],
            r"TL_2_단일\.zip is still in pieces \(3 files .part…\); join each.*ls -v 'TL_2_단일\.zip'\.part",
        ),
    ],
)
def test_archives_in_pieces_are_named_with_the_command(
    tree: Tree, tmp_path: Path, pieces: list[str], message: str
) -> None:
    for part in official(tree):
        zipped_in_folders(*part, tmp_path / "other")
    for name in pieces:
        split_file(tmp_path / "other" / name / f"{name}.zip")
    with pytest.raises(UserError, match=message):
        rows(tmp_path / "other", tmp_path / "out")


def test_some_photo_archives_in_pieces_are_noted_and_joined_by_the_command(tree: Tree, tmp_path: Path) -> None:
    import subprocess

    for part in official(tree):
        zipped_in_folders(*part, tmp_path / "other")
    whole, _ = rows(tmp_path / "other", tmp_path / "whole")
    split_file(tmp_path / "other/TS_2_단일/TS_2_단일.zip")
    found, notes = rows(tmp_path / "other", tmp_path / "out")
    assert 0 < len(found) < len(whole)
    (note,) = [note for note in notes if "pieces" in note]
    assert note.startswith("not read, still in 3 pieces: TS_2_단일/TS_2_단일.zip; join them, in its folder: ls -v")
    subprocess.run(note.partition("folder: ")[2], shell=True, check=True, cwd=tmp_path / "other/TS_2_단일")
    assert rows(tmp_path / "other", tmp_path / "again")[0] == whole


@pytest.mark.parametrize(
    ("change", "problem", "has_box"),
    [
        ({"file_name": "K-000001_0_2_0_0_75_000_200.png"}, None, True),
        ({"file_name": "x.png"}, None, True),
        ({"file_name": "K-000002_0_2_0_0_75_000_200.png"}, "other_photo", False),
        ({"annotations": [{"bbox": [1, 2, 3, 4]}, {"bbox": [5, 2, 3, 4]}]}, "two_boxes", False),
    ],
)
def test_labels_of_another_photo_and_two_boxes_are_findings(
    tree: Tree, tmp_path: Path, change: dict[str, Any], problem: str | None, has_box: bool
) -> None:
    for number in (1, 2):
        tree.single(f"K-00000{number}")
        tree.single(f"K-00000{number}", longitude=20)
    file_name = change.pop("file_name", "x.png")
    document = label_document("K-000001", file_name=file_name) | change
    label = next(tree.root.rglob("K-000001_0_2_0_0_75_000_200.json"))
    label.write_text(json.dumps(document), encoding="utf-8")
    found, notes = rows(tree.root, tmp_path / "out")
    assert (found["K-000001_0_2_0_0_75_000_200"][1][0] is not None) == has_box
    assert [note for note in notes if note.startswith("labels with problem")] == (
        [f"labels with problem {problem}: 1, the first {label.relative_to(tree.root)}"] if problem else []
    )


def test_pills_with_one_box_are_a_finding(tree: Tree, tmp_path: Path) -> None:
    codes = ["K-000001", "K-000002", "K-000003"]
    for latitude in (70, 75):
        tree.combination(codes, latitude=latitude, boxes={code: [1, 2, 3, 4] for code in codes})
    _, notes = rows(tree.root, tmp_path / "out")
    assert "labels with problem same_box: 2, the first K-000001-000002-000003_0_2_0_2_70_000_200" in notes
