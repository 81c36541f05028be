from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console

from pillsnap.errors import UserError
from pillsnap.manifest.audit.audit import audit
from pillsnap.manifest.audit.report import AuditReport
from pillsnap.manifest.table import SCHEMA, class_list, write_manifest
from tests.unit.conftest import Tree


def pixels(seed: int, size: tuple[int, int] = (64, 80)) -> np.ndarray:
    """A smooth random picture, `size` = (width, height): distinct, and robust to small changes."""
    coarse = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return cv2.resize(coarse, size, interpolation=cv2.INTER_CUBIC)


class Set:
    """Photos p0.png … p11.png under root, the last three in validation, and their manifest rows."""

    def __init__(self, tmp_path: Path) -> None:
        self.root = tmp_path / "root"
        self.out = tmp_path / "out"
        self.rows: list[dict[str, Any]] = []
        (self.root / "photos").mkdir(parents=True)
        for i in range(12):
            cv2.imwrite(str(self.root / f"photos/p{i}.png"), pixels(i))
            self.rows.append(
                {
                    "sample_id": f"p{i}", "image_path": f"photos/p{i}.png", "image_type": "single",
                    "codes": ["a" if i % 2 else "b"], "boxes": [[8, 8, 40, 40]], "width": 64, "height": 80,
                    "group": f"g{i}", "split": "val" if i > 8 else "train", "source": "test",
                }
            )  # fmt: skip

    def photo(self, i: int) -> Path:
        return self.root / f"photos/p{i}.png"

    def audit(self, **options: Any) -> AuditReport:
        """Write the rows without write_manifest's checks, and audit them."""
        good = pa.Table.from_pylist(self.rows[:1], schema=SCHEMA)
        table = pa.Table.from_pylist(self.rows, schema=SCHEMA)
        path = write_manifest(
            good,
            self.out,
            class_list(pa.Table.from_pylist([r for r in self.rows if r["split"] != "holdout"]))
            if "class_file" not in options
            else [],
        )
        import pyarrow.parquet as pq

        pq.write_table(table, path)
        if options.pop("class_file", True) is False:
            (self.out / "classes.json").unlink()
        return audit(self.out, self.root, **options)


@pytest.fixture
def photos(tmp_path: Path) -> Set:
    return Set(tmp_path)


def kinds(report: AuditReport, severity: str = "error") -> dict[str, list[str]]:
    return {found.kind: found.examples for found in report.findings if found.severity == severity}


@pytest.mark.parametrize(("codes", "kind"), [(["a", "b"], "same_box_two_classes"), (["a", "a"], "repeated_pill")])
def test_one_box_twice_is_a_warning(photos: Set, codes: list[str], kind: str) -> None:
    photos.rows[3] |= {"codes": codes, "boxes": [[8, 8, 40, 40]] * 2}
    assert kinds(photos.audit(), "warning")[kind] == ["p3"]


def test_test_photos_are_a_split_of_their_own(photos: Set) -> None:
    photos.rows[11] |= {"split": "test"}
    assert photos.audit().fit
    photos.rows[10] |= {"group": "g11"}
    assert kinds(photos.audit(), "warning")["group_in_val_and_test"] == ["g11"]
    photos.rows[3] |= {"group": "g11"}
    assert kinds(photos.audit())["group_overlap"] == ["g11"]


@pytest.mark.parametrize("deep", [False, True])
def test_good_manifest_is_fit(photos: Set, deep: bool) -> None:
    report = photos.audit(deep=deep)
    assert report.fit
    assert kinds(report) == {}
    assert (report.num_photos, report.num_train, report.num_val, report.num_classes) == (12, 9, 3, 2)
    assert kinds(report, "warning") == {"few_photos": ["a"]}


def test_audit_writes_nothing(photos: Set) -> None:
    photos.audit()
    before = {path: path.stat().st_mtime_ns for path in [*photos.root.rglob("*"), *photos.out.rglob("*")]}
    audit(photos.out / "manifest.parquet", photos.root, deep=True)
    assert {path: path.stat().st_mtime_ns for path in [*photos.root.rglob("*"), *photos.out.rglob("*")]} == before


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def link(path: Path) -> None:
    path.rename(path.with_suffix(".real"))
    path.symlink_to(path.with_suffix(".real"))


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def bomb(path: Path) -> None:
    header = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (30_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    path.write_bytes(header + bytes(2000) + b"IEND\xaeB`\x82")


SPOILT: list[tuple[Callable[[Path], object], str]] = [
    (Path.unlink, "missing"),
    (cut, "truncated"),
    (lambda path: path.write_bytes(b""), "empty"),
    (lambda path: path.write_text("text"), "not_an_image"),
    (link, "link"),
    (fifo, "not_a_file"),
    (folder, "not_a_file"),
    (bomb, "too_large"),
    (lambda path: cv2.imwrite(str(path), pixels(1, (80, 64))), "other_size"),
]


@pytest.mark.timeout(30)
@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize(("spoil", "kind"), SPOILT)
def test_damaged_photo_is_found_and_named(photos: Set, spoil: Callable[[Path], object], kind: str, deep: bool) -> None:
    spoil(photos.photo(3))
    report = photos.audit(deep=deep)
    assert not report.fit
    assert list(kinds(report)) == [kind]
    assert len(kinds(report)[kind]) == 1
    assert kinds(report)[kind][0].startswith("photos/p3.png")


def test_flipped_byte_is_found_only_by_decoding(photos: Set) -> None:
    flip(photos.photo(3))
    assert photos.audit().fit
    assert list(kinds(photos.audit(deep=True))) == ["corrupt"]


@pytest.mark.parametrize("path", ["../secret.png", "/etc/passwd", "photos/../../x.png", "a\0b.png", ""])
def test_paths_out_of_the_root_are_refused(photos: Set, path: str) -> None:
    photos.rows[3]["image_path"] = path
    report = photos.audit()
    assert "outside_root" in kinds(report)


def test_folder_link_out_of_the_root_is_refused(photos: Set, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    shutil.copy(photos.photo(3), tmp_path / "outside/p3.png")
    (photos.root / "elsewhere").symlink_to(tmp_path / "outside")
    photos.rows[3]["image_path"] = "elsewhere/p3.png"
    assert list(kinds(photos.audit())) == ["outside_root"]
    (photos.root / "TS_1_single").symlink_to(tmp_path / "outside")
    photos.rows[3]["image_path"] = "TS_1_single/p3.png"
    assert photos.audit().fit


@pytest.mark.parametrize(
    ("change", "kind", "example"),
    [
        ({"sample_id": "p4"}, "duplicate_sample_id", "p4"),
        ({"image_path": "photos/p4.png"}, "duplicate_path", "photos/p4.png"),
        ({"split": "holdout"}, "bad_split", "p3"),
        ({"group": "g10"}, "group_overlap", "g10"),
        ({"boxes": []}, "uneven_boxes", "p3"),
        ({"boxes": [[8, 8, 0, 40]]}, "empty_box", "p3"),
        ({"boxes": [[8, 8, float("nan"), 40]]}, "empty_box", "p3"),
        ({"boxes": [[70, 8, 10, 10]]}, "box_outside", "p3"),
        ({"boxes": [[8, 8, 10]]}, "malformed_box", "p3"),
        ({"width": 65}, "other_size", "photos/p3.png (64 x 80)"),
    ],
)
def test_wrong_row_is_found_and_named(photos: Set, change: dict, kind: str, example: str) -> None:
    photos.rows[3] |= change
    assert kinds(photos.audit()).get(kind) == [example]


def test_boxes_across_the_border_and_missing_boxes_are_warnings(photos: Set) -> None:
    photos.rows[3]["boxes"] = [[40, 8, 30, 40]]
    photos.rows[4] |= {"codes": ["a", "b"], "boxes": [[8, 8, 9, 9], None]}
    report = photos.audit()
    assert report.fit
    assert kinds(report, "warning")["box_crosses_border"] == ["p3"]
    assert kinds(report, "warning")["incomplete_labels"] == ["p4"]


def test_unknown_size_is_taken_from_the_header(photos: Set) -> None:
    photos.rows[3] |= {"width": 0, "height": 0, "boxes": [[70, 8, 10, 10]]}
    assert list(kinds(photos.audit())) == ["box_outside"]


def test_codes(photos: Set) -> None:
    photos.rows[11]["codes"] = ["only in val"]
    assert kinds(photos.audit())["class_only_in_val"] == ["only in val"]
    photos.rows[11]["codes"] = ["a"]
    assert "no_class_map" in kinds(photos.audit(class_file=False), "warning")
    assert kinds(photos.audit(class_file=True))["unknown_code"] == ["a", "b"]


def test_codes_of_an_ai_hub_name_must_match(photos: Set) -> None:
    name = "photos/K-000001-000002_0_2_0_2_70_000_200.png"
    photos.photo(3).rename(photos.root / name)
    photos.rows[3] |= {"image_path": name, "codes": ["K-000001"]}
    assert kinds(photos.audit())["name_mismatch"] == ["p3"]


def test_both_splits_must_have_photos(photos: Set) -> None:
    for row in photos.rows:
        row["split"] = "train"
    assert "no_val" in kinds(photos.audit())


def test_no_complete_photo(photos: Set) -> None:
    for row in photos.rows:
        row["boxes"] = [None]
    assert "no_complete_photo" in kinds(photos.audit())


@pytest.mark.parametrize("deep", [False, True])
def test_equal_bytes(photos: Set, deep: bool) -> None:
    shutil.copy(photos.photo(0), photos.photo(10))
    shutil.copy(photos.photo(1), photos.photo(2))
    shutil.copy(photos.photo(3), photos.photo(5))
    report = photos.audit(deep=deep)
    assert kinds(report) == {
        "duplicate_across_split": ["photos/p0.png = photos/p10.png"],
        "duplicate_other_codes": ["photos/p1.png = photos/p2.png"],
    }
    assert kinds(report, "warning")["duplicate_content"] == ["photos/p3.png = photos/p5.png"]


def test_equal_ends_are_not_duplicates(photos: Set) -> None:
    head, tail = photos.photo(0).read_bytes()[:33], photos.photo(0).read_bytes()[-12:]
    for i, middle in ((0, b"\0"), (10, b"\1")):
        photos.photo(i).write_bytes(head + bytes(6000) + middle + bytes(6000) + tail)
    assert photos.audit().fit


@pytest.mark.parametrize("change", ["jpeg", "brighter", "noise"])
def test_near_duplicates_across_the_split(photos: Set, change: str) -> None:
    image = pixels(0).astype(np.float64)
    if change == "brighter":
        image = image * 1.05 + 4
    if change == "noise":
        image += np.random.default_rng(0).normal(0, 3, image.shape)
    image = image.clip(0, 255).astype(np.uint8)
    if change == "jpeg":
        photos.rows[10]["image_path"] = "photos/p10.jpg"
        cv2.imwrite(str(photos.root / "photos/p10.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, 60])
    else:
        cv2.imwrite(str(photos.photo(10)), image)
    found = kinds(photos.audit(deep=True), "warning")["near_duplicate"]
    assert found == [f"photos/p0.png ~ {photos.rows[10]['image_path']}"]


def test_worker_processes_find_the_same(photos: Set, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(photos.photo(3))
    alone = photos.audit(num_workers=1)
    monkeypatch.setattr("pillsnap.manifest.audit.audit._PROCESSES_FROM", {False: 1, True: 1})
    monkeypatch.setattr("pillsnap.manifest.audit.audit._CHUNK", {False: 5, True: 5})
    calls = []
    assert photos.audit(num_workers=2, progress=lambda *call: calls.append(call)) == alone
    assert calls[-1] == ("photos", 12, 12)


def test_report_as_table_and_json(photos: Set) -> None:
    cut(photos.photo(3))
    report = photos.audit()
    document = json.loads(json.dumps(report.to_dict()))
    assert document["fit"] is False
    assert document["findings"][0]["kind"] == "truncated"
    assert document["findings"][0]["count"] == 1
    console = Console(width=160, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    report.print_summary(console)
    text = console.export_text()
    assert "not fit to train on" in text
    assert "photos/p3.png" in text


def test_missing_manifest_and_root_are_one_line(photos: Set, tmp_path: Path) -> None:
    photos.audit()
    with pytest.raises(UserError, match="data root is not a folder"):
        audit(photos.out, tmp_path / "nowhere")
    with pytest.raises(UserError, match="no such manifest"):
        audit(tmp_path / "nowhere", photos.root)


def test_built_manifest_of_a_tree_is_fit(tree: Tree, tmp_path: Path) -> None:
    from pillsnap.manifest.build import build_manifest

    for code in ("K-000001", "K-000002"):
        for longitude in range(0, 200, 20):
            tree.single(code, longitude=longitude, pixels=True)
    for latitude in (70, 75, 90):
        tree.combination(["K-000001", "K-000002"], latitude=latitude, without=["K-000002"], pixels=True)
    build_manifest(tree.root, tmp_path / "out", num_photos=None, num_classes=None)
    report = audit(tmp_path / "out", tree.root, deep=True)
    assert report.fit
    assert len(kinds(report, "warning")["incomplete_labels"]) == 3
