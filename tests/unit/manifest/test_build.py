from __future__ import annotations

import json
import unicodedata
from collections import defaultdict
from pathlib import Path
from typing import Any, Literal

import pytest

from pillsnap.errors import UserError
from pillsnap.manifest.audit.audit import audit
from pillsnap.manifest.build import BuildResult, build_manifest
from pillsnap.manifest.label_reading import LabelReader
from pillsnap.manifest.table import read_classes, read_manifest
from tests.unit.conftest import Tree

Form = Literal["NFC", "NFD"]


def build(tree: Tree, out: Path, **change: Any) -> BuildResult:
    return build_manifest(tree.root, out, **({"num_photos": None, "num_classes": None} | change))


def rows(result: BuildResult) -> list[dict]:
    return read_manifest(result.path).to_pylist()


def test_row_of_a_single_photo(tree: Tree, tmp_path: Path) -> None:
    for longitude in (0, 20, 260):
        tree.single("K-000114", direction=1, light=2, longitude=longitude)
    row = rows(build(tree, tmp_path / "out"))[2]
    assert row == {
        "sample_id": "K-000114_0_2_1_2_75_260_200",
        "image_path": "train/images/single/TS_1_single/K-000114/K-000114_0_2_1_2_75_260_200.png",
        "image_type": "single", "codes": ["K-000114"], "boxes": [[10, 12, 20.5, 8]], "width": 50, "height": 60,
        "group": "K-000114_1_260", "split": row["split"], "source": "aihub/train", "state": 0, "background": 2,
        "direction": 1, "light": 2, "latitude": 75, "longitude": 260, "size": 200,
        "archive": None, "member": None, "offset": None, "length": None, "compression": None,
        "location": "train/images/single/TS_1_single/K-000114/K-000114_0_2_1_2_75_260_200.png",
    }  # fmt: skip


def test_combination_boxes_follow_the_codes_of_the_name(tree: Tree, tmp_path: Path) -> None:
    codes = ["K-000003", "K-000001", "K-000002"]
    boxes = {code: [10.0 * int(code[-1]), 0.0, 5.0, 5.0] for code in codes}
    for latitude in (70, 75):
        tree.combination(codes, latitude=latitude, boxes=boxes, without=["K-000001"])
    result = build(tree, tmp_path / "out")
    for row in rows(result):
        assert row["codes"] == codes
        assert row["boxes"] == [[30, 0, 5, 5], None, [20, 0, 5, 5]]
        assert row["image_type"] == "combination"
        assert row["group"] == "K-000003-000001-000002"
    assert result.report["labels"]["problems"]["missing"]["count"] == 2
    assert result.report["got"]["photos_with_every_box"] == 0
    assert any("2 of 6 pills have no box" in note for note in result.report["notes"])


def test_bad_labels_are_null_boxes_counted_and_listed(tree: Tree, tmp_path: Path) -> None:
    tree.single("K-000001", longitude=0)
    tree.single("K-000001", longitude=20, label=b"{broken")
    tree.single("K-000001", longitude=40, label={"bbox": [5, 5, 0, 3]})
    tree.single("K-000001", longitude=60, label={"dl_mapping_code": "K-000002"})
    result = build(tree, tmp_path / "out")
    assert [row["boxes"][0] is None for row in rows(result)] == [False, True, True, True]
    problems = result.report["labels"]["problems"]
    assert {name: entry["count"] for name, entry in problems.items()} == {"broken": 1, "empty_box": 1, "other_code": 1}
    assert problems["broken"]["listed"][0].endswith("K-000001_json/K-000001_0_2_0_0_75_020_200.json")
    assert json.loads((tmp_path / "out/sampling_report.json").read_text(encoding="utf-8")) == result.report


@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize(
    ("label_reader", "num_workers"), [("auto", 1), ("auto", 2), ("processes", 2), ("processes", 3), ("ray", 2)]
)
def test_bytes_depend_only_on_tree_and_seed(
    tree: Tree, tmp_path: Path, label_reader: LabelReader, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pillsnap.manifest.label_reading._CHUNK", 7)
    monkeypatch.setattr("pillsnap.manifest.label_reading._RAY_CHUNK", 7)
    tree.many(6)
    first = build(tree, tmp_path / "a", num_photos=60, num_workers=1)
    second = build(tree, tmp_path / "b", num_photos=60, num_workers=num_workers, label_reader=label_reader)
    other = build(tree, tmp_path / "c", num_photos=60, seed=7, num_workers=1)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == [
        "classes.json",
        "manifest.parquet",
        "manifest_train.csv",
        "manifest_val.csv",
        "sampling_report.json",
    ]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert first.path.read_bytes() != other.path.read_bytes()
    assert second.report == first.report


def test_counts_are_as_requested(tree: Tree, tmp_path: Path) -> None:
    tree.many(8, combinations=8)
    result = build(tree, tmp_path / "out", num_photos=100, num_classes=5, combination_fraction=0.06, val_fraction=0.2)
    got = result.report["got"]
    assert (got["num_photos"], got["num_classes"], got["num_combination"], got["num_single"]) == (100, 5, 6, 94)
    assert got["val_fraction"] == pytest.approx(0.2, abs=0.02)
    assert result.report["notes"] == []
    classes = read_classes(result.path.parent)
    assert [info.num_train + info.num_val for info in classes] == [
        sum(info.code in row["codes"] for row in rows(result)) for info in classes
    ]
    assert classes[0].edi_codes == ["642200750", "A13100741"]
    assert classes[0].name == f"약 {classes[0].code}"


def test_shortage_is_noted(tree: Tree, tmp_path: Path) -> None:
    tree.many(3, combinations=1)
    result = build(tree, tmp_path / "out", num_photos=1000, num_classes=50, combination_fraction=0.5)
    assert result.report["got"]["num_photos"] == 3 * 24 + 3
    assert result.report["notes"][:3] == [
        "num_photos: 1000 requested, 75 found",
        "num_classes: 50 requested, 3 found",
        "combination photos: 500 requested, 3 taken",
    ]


def test_no_group_in_both_splits_and_no_class_only_in_validation(tree: Tree, tmp_path: Path) -> None:
    tree.many(7, longitudes=5, combinations=7)
    for seed in range(5):
        found = rows(build(tree, tmp_path / str(seed), seed=seed, val_fraction=0.4, combination_fraction=0.3))
        sides, codes = defaultdict(set), defaultdict(set)
        for row in found:
            sides[row["group"]].add(row["split"])
            codes[row["split"]].update(row["codes"])
        assert all(len(side) == 1 for side in sides.values())
        assert codes["val"] <= codes["train"]
        assert 0.3 < sum(row["split"] == "val" for row in found) / len(found) < 0.5


def test_tree_of_combinations_only(tree: Tree, tmp_path: Path) -> None:
    for number in range(1, 9):
        for latitude in (70, 75, 90):
            tree.combination([f"K-{number:06d}", f"K-{number % 8 + 1:06d}"], latitude=latitude)
    found = rows(build(tree, tmp_path / "out", val_fraction=0.25))
    assert len(found) == 24
    assert {code for row in found if row["split"] == "train" for code in row["codes"]} == {
        f"K-{number:06d}" for number in range(1, 9)
    }
    assert sum(row["split"] == "val" for row in found) == 6


def test_class_with_one_photo_is_left_out_and_listed(tree: Tree, tmp_path: Path) -> None:
    tree.many(3)
    tree.single("K-000099")
    result = build(tree, tmp_path / "out")
    assert result.report["left_out"]["classes_with_too_few_photos"] == {"count": 1, "listed": ["K-000099"]}
    assert "K-000099" not in {info.code for info in read_classes(tmp_path / "out")}


def test_photo_in_two_folders_is_taken_once_and_listed(tree: Tree, tmp_path: Path) -> None:
    tree.many(2, combinations=0)
    tree.single("K-000001", part=2)
    result = build(tree, tmp_path / "out")
    listed = result.report["left_out"]["photos_found_twice"]
    assert listed == {
        "count": 1,
        "listed": ["train/images/single/TS_2_single/K-000001/K-000001_0_2_0_0_75_000_200.png"],
    }


def test_excluded_validation_groups_never_train(tree: Tree, tmp_path: Path) -> None:
    tree.many(6)
    earlier = build(tree, tmp_path / "stage1", num_photos=60)
    later = build(tree, tmp_path / "stage2", exclude=tmp_path / "stage1")
    earlier_val = {row["group"] for row in rows(earlier) if row["split"] == "val"}
    assert earlier_val
    assert not earlier_val & {row["group"] for row in rows(later) if row["split"] == "train"}
    assert later.report["left_out"]["photos_of_excluded_groups"] >= len(earlier_val)


def test_exclusion_uses_the_present_groups(tree: Tree, tmp_path: Path) -> None:
    """An earlier manifest grouped by latitude, excluded from one grouped by side and longitude."""
    for latitude in (60, 70, 75, 90):
        for longitude in range(0, 100, 20):
            for direction in (0, 1):
                tree.single("K-000001", latitude=latitude, longitude=longitude, direction=direction)
    earlier = rows(build(tree, tmp_path / "a", num_photos=8, group_by=("latitude", "longitude"), val_fraction=0.3))
    held_out = {(row["direction"], row["longitude"]) for row in earlier if row["split"] == "val"}
    later = rows(build(tree, tmp_path / "b", exclude=tmp_path / "a"))
    assert held_out
    assert later
    assert not held_out & {(row["direction"], row["longitude"]) for row in later}


def test_photos_are_grouped_by_the_stated_fields(tree: Tree, tmp_path: Path) -> None:
    for latitude in (60, 70, 75, 90):
        for longitude in range(0, 100, 20):
            tree.single("K-000001", latitude=latitude, longitude=longitude)
    result = build(tree, tmp_path / "out", group_by=("latitude",), val_fraction=0.25)
    assert {row["group"] for row in rows(result)} == {f"K-000001_{latitude}" for latitude in (60, 70, 75, 90)}
    assert len({row["latitude"] for row in rows(result) if row["split"] == "val"}) == 1
    assert result.report["asked"]["group_by"] == ["latitude"]


@pytest.mark.parametrize(("photos", "labels"), [("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD")])
def test_photos_and_labels_match_across_unicode_forms(tree: Tree, tmp_path: Path, photos: Form, labels: Form) -> None:
    for longitude in range(0, 100, 20):
        tree.single("K-000001", longitude=longitude)
    for kind, part, form in (("images", "TS_1", photos), ("labels", "TL_1", labels)):
        folder = tree.root / "train" / kind / "single" / f"{part}_single"
        folder.rename(folder.with_name(unicodedata.normalize(form, f"{part}_단일")))
    result = build(tree, tmp_path / "out")
    assert result.report["labels"]["problems"] == {}
    assert all((tree.root / row["image_path"]).is_file() and row["boxes"] != [None] for row in rows(result))


@pytest.mark.parametrize("zipped", [False, True])
def test_validation_copies_of_training_photos_are_left_out(tree: Tree, tmp_path: Path, zipped: bool) -> None:
    """A training photo has a copy in each split: the one in validation is left out and listed."""
    photos = [
        tree.single("K-000001", longitude=longitude, direction=direction, latitude=latitude, pixels=True)
        for longitude in range(0, 300, 20) for direction in (0, 1) for latitude in (60, 70, 75, 90)
    ]  # fmt: skip
    plain = {row["sample_id"]: row["split"] for row in rows(build(tree, tmp_path / "before"))}
    trained = [photo for photo in photos if plain[photo.stem] == "train"]
    held_out = next(photo for photo in photos if plain[photo.stem] == "val")
    for copy in (trained[5], held_out):
        copy.write_bytes(trained[0].read_bytes())
    root = tree.root
    if zipped:
        from tests.unit.photos.test_archives import zip_tree

        root = tmp_path / "zipped"
        zip_tree(tree.root, root)
    result = build_manifest(root, tmp_path / "after", num_photos=None, num_classes=None)
    listed = result.report["left_out"]["validation_photos_equal_to_training_photos"]
    assert listed["count"] == 1
    assert listed["listed"][0].endswith(held_out.name)
    assert {row["sample_id"] for row in rows(result)} == set(plain) - {held_out.stem}
    report = audit(result.path, root)
    assert report.fit
    assert [found.kind for found in report.findings if "duplicate" in found.kind] == ["duplicate_content"]
    unchecked = build_manifest(root, tmp_path / "unchecked", num_photos=None, num_classes=None, check_copies=False)
    assert not audit(unchecked.path, root).fit


def test_tree_of_copies_is_noted(tree: Tree, tmp_path: Path) -> None:
    for longitude in range(0, 300, 20):
        photo = tree.single("K-000001", longitude=longitude, pixels=True)
        photo.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))
    result = build(tree, tmp_path / "out")
    num_val = result.report["got"]["num_val"]
    assert num_val == 3
    assert f"{num_val} validation photos are byte-identical to training photos" in result.report["notes"][-1]


def test_sample_does_not_depend_on_folders(tree: Tree, tmp_path: Path) -> None:
    tree.many(5, combinations=0)
    before = rows(build(tree, tmp_path / "a", num_photos=40))
    images = tree.root / "train/images/single"
    labels = tree.root / "train/labels/single"
    for base, part in ((images, "TS_9_single"), (labels, "TL_9_single")):
        (base / part).mkdir()
        for folder in [path for path in base.glob("*/*") if path.name.startswith("K-000002")]:
            folder.rename(base / part / folder.name)
    after = rows(build(tree, tmp_path / "b", num_photos=40))
    for row in before + after:
        del row["image_path"], row["location"]
    assert before == after


def test_empty_sample_is_a_one_line_error(tree: Tree, tmp_path: Path) -> None:
    tree.single("K-000001")
    with pytest.raises(UserError, match="none of 1 photos is left after sampling: 1 classes have fewer than 2"):
        build(tree, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_progress_reaches_its_total(tree: Tree, tmp_path: Path) -> None:
    tree.many(3)
    calls: list[tuple[str, int, int]] = []
    build(tree, tmp_path / "out", progress=lambda *call: calls.append(call))
    last = {phase: (done, total) for phase, done, total in calls}
    photos, labels = 3 * 24 + 3 * 3, 3 * 24 + 3 * 9
    assert last == {"scan": (2, 2), "labels": (labels, labels), "duplicates": (photos, photos)}
