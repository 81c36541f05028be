from __future__ import annotations

import os
import struct
import unicodedata
import zipfile
from pathlib import Path

import pytest

from pillsnap.errors import UserError
from pillsnap.manifest.audit.audit import audit
from pillsnap.manifest.build import build_manifest
from pillsnap.manifest.table import read_manifest
from pillsnap.photos.archives import (  # fmt: skip
    Place,
    find_archives,
    locate,
    parse_location,
    read_directory,
    read_place,
    to_location,
)
from tests.unit.conftest import Tree


def zip_tree(root: Path, to: Path, compression: int = zipfile.ZIP_STORED) -> None:
    """Pack an unpacked tree as AI Hub delivers it: one archive per TS_* or TL_* folder, with the Korean name."""
    to.mkdir(parents=True)
    for part in sorted(root.glob("train/*/*/T?_*")):
        name = part.name.replace("single", "단일").replace("combo", "조합")
        with zipfile.ZipFile(to / f"{name}.zip", "w", compression) as archive:
            for path in sorted(part.rglob("*")):
                archive.write(path, path.relative_to(part).as_posix())


def test_location_round_trip() -> None:
    place = Place("a b/TS_1_단일.zip", 123, 456, 8)
    assert parse_location(to_location(place)) == place
    assert parse_location("train/a.png") is None
    assert parse_location("train/a.png::1:2:0") is None


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_every_member_is_found_and_read_exactly(tmp_path: Path, compression: int) -> None:
    contents = {f"K-{i:06d}/x_{i}.png": os.urandom(100 + i) * 3 for i in range(50)}
    with zipfile.ZipFile(tmp_path / "a.zip", "w", compression) as archive:
        archive.mkdir("K-000000")
        for name, data in contents.items():
            archive.writestr(name, data)
        archive.comment = b"a comment behind the directory"
    members = list(read_directory(tmp_path / "a.zip"))
    assert [member.name for member in members] == list(contents)
    places = locate(str(tmp_path), "a.zip", members)
    assert [read_place(str(tmp_path), place) for place in places] == list(contents.values())
    if compression == zipfile.ZIP_STORED:
        with (tmp_path / "a.zip").open("rb") as file:
            file.seek(places[7].offset)
            assert file.read(places[7].length) == contents["K-000007/x_7.png"]


def test_zip64(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("a.png", "b.png"):
            with archive.open(name, "w", force_zip64=True) as file:
                file.write(name.encode())
    # Rewrite the second entry as beyond 4 GiB: 32-bit fields full, the values in the extra field.
    data = (tmp_path / "a.zip").read_bytes()
    second = data.rfind(b"PK\1\2")
    end = data.rfind(b"PK\5\6")
    entry = bytearray(data[second:end])
    size, offset = struct.unpack_from("<L", entry, 24)[0], struct.unpack_from("<L", entry, 42)[0]
    struct.pack_into("<2L", entry, 20, 0xFFFFFFFF, 0xFFFFFFFF)
    struct.pack_into("<H", entry, 30, 28)
    struct.pack_into("<L", entry, 42, 0xFFFFFFFF)
    entry += struct.pack("<2H3Q", 1, 24, size, size, offset)
    count, length, start = 2, end - data.find(b"PK\1\2") + 28, data.find(b"PK\1\2")
    where = start + length
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, length, start)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, where, 1)
    tail = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    (tmp_path / "b.zip").write_bytes(data[:second] + bytes(entry) + record + locator + tail)
    members = list(read_directory(tmp_path / "b.zip"))
    places = locate(str(tmp_path), "b.zip", members)
    assert [read_place(str(tmp_path), place) for place in places] == [b"a.png", b"b.png"]


def test_cp949_names(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("XX/b.png", b"1")
    data = (tmp_path / "a.zip").read_bytes().replace(b"XX/", "약".encode("cp949") + b"/")
    (tmp_path / "a.zip").write_bytes(data)
    assert [member.name for member in read_directory(tmp_path / "a.zip")] == ["약/b.png"]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_archives_are_found_with_their_labels(tmp_path: Path, form: str) -> None:
    for name in (
        "원천/TS_1_단일.zip",
        "원천/TS_2_조합.zip",
        "라벨/TL_1_단일.zip",
        "VS_1_단일.zip",
        "other.zip",
        "x/TS_1.zip",
    ):
        path = tmp_path / unicodedata.normalize(form, name)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    os.mkfifo(tmp_path / "TS_3_단일.zip")
    (tmp_path / "loop").symlink_to(tmp_path)
    found = find_archives(tmp_path)
    assert {
        unicodedata.normalize("NFC", key): value and unicodedata.normalize("NFC", value) for key, value in found.items()
    } == {
        "원천/TS_1_단일.zip": "라벨/TL_1_단일.zip",
        "원천/TS_2_조합.zip": None,
    }
    assert all((tmp_path / key).is_file() for key in found)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zipped_and_unpacked_trees_give_the_same_rows_and_bytes(tree: Tree, tmp_path: Path, compression: int) -> None:
    for number in range(1, 5):
        for longitude in range(0, 120, 20):
            tree.single(f"K-{number:06d}", longitude=longitude, part=number % 2 + 1, pixels=True)
    for latitude in (70, 75, 90):
        tree.combination(["K-000001", "K-000002", "K-000003"], latitude=latitude, without=["K-000002"], pixels=True)
    zip_tree(tree.root, tmp_path / "zipped/deep", compression)
    options = {"num_photos": 20, "num_classes": 3, "combination_fraction": 0.15}
    plain = build_manifest(tree.root, tmp_path / "a", **options)
    zipped = build_manifest(tmp_path / "zipped", tmp_path / "b", **options)
    assert zipped.report["labels"]["problems"]["missing"]["count"] == 3
    rows = [read_manifest(result.path).to_pylist() for result in (plain, zipped)]
    locations = read_manifest(zipped.path)["location"].to_pylist()
    for a, b, location in zip(*rows, locations, strict=True):
        place = parse_location(location)
        assert place is not None
        assert read_place(str(tmp_path / "zipped"), place) == (tree.root / a["image_path"]).read_bytes()
        assert b["archive"].endswith(".zip") and b["image_path"] == f"{b['archive']}/{b['member']}"
        for name in ("image_path", "location", "archive", "member", "offset", "length", "compression"):
            del a[name], b[name]
        assert a == b
    assert (tmp_path / "a/classes.json").read_bytes() == (tmp_path / "b/classes.json").read_bytes()


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_audit_reads_archives(tree: Tree, tmp_path: Path, compression: int) -> None:
    for longitude in range(0, 240, 20):
        photo = tree.single("K-000001", longitude=longitude, pixels=True)
    photo.write_bytes(photo.read_bytes()[:-300])
    zip_tree(tree.root, tmp_path / "zipped", compression)
    result = build_manifest(tmp_path / "zipped", tmp_path / "out", num_photos=None, num_classes=None)
    for deep in (False, True):
        report = audit(result.path, tmp_path / "zipped", deep=deep)
        assert [found.kind for found in report.findings if found.severity == "error"] == ["truncated"]
        assert photo.name in report.findings[0].examples[0]


def test_only_the_header_of_a_large_deflated_photo_is_inflated_unless_deep(tree: Tree, tmp_path: Path) -> None:
    """Inflating 100,000 photos of 1 MB takes minutes: without --deep only their headers are inflated."""
    import cv2
    import numpy as np

    for longitude in range(0, 240, 20):
        photo = tree.single("K-000001", longitude=longitude, label={"width": 300, "height": 200})
        noise = np.random.default_rng(longitude).integers(0, 255, (200, 300, 3), dtype=np.uint8)
        cv2.imwrite(str(photo), noise)
    photo.write_bytes(photo.read_bytes()[:-300])
    zip_tree(tree.root, tmp_path / "zipped", zipfile.ZIP_DEFLATED)
    result = build_manifest(tmp_path / "zipped", tmp_path / "out", num_photos=None, num_classes=None)
    assert audit(result.path, tmp_path / "zipped").fit
    found = audit(result.path, tmp_path / "zipped", deep=True).findings
    assert [one.kind for one in found if one.severity == "error"] == ["truncated"]


def test_unpacked_photo_is_preferred_to_its_zipped_copy(tree: Tree, tmp_path: Path) -> None:
    tree.many(2, combinations=0)
    zip_tree(tree.root, tree.root / "zips")
    result = build_manifest(tree.root, tmp_path / "out", num_photos=None, num_classes=None)
    assert result.report["left_out"]["photos_found_twice"]["count"] == 48
    assert read_manifest(result.path)["archive"].null_count == 48


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\5\6" + bytes(10), b"PK\5\6" + b"\xff" * 18])
def test_damaged_archives_give_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "TS_1_단일.zip").write_bytes(content)
    with pytest.raises(UserError, match=r"TS_1_단일\.zip"):
        build_manifest(tmp_path, tmp_path / "out", num_photos=None, num_classes=None)


def test_truncated_archive_gives_one_line(tree: Tree, tmp_path: Path) -> None:
    tree.many(2, combinations=0)
    zip_tree(tree.root, tmp_path / "zipped")
    path = tmp_path / "zipped/TS_1_단일.zip"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match="not a ZIP archive, or cut off"):
        build_manifest(tmp_path / "zipped", tmp_path / "out", num_photos=None, num_classes=None)


def test_damaged_member_gives_one_line(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", b"abc" * 1000)
    (place,) = locate(str(tmp_path), "a.zip", list(read_directory(tmp_path / "a.zip")))
    with pytest.raises(UserError, match="ends before the member"):
        read_place(str(tmp_path), place._replace(length=10_000))
    with pytest.raises(UserError, match="damaged"):
        read_place(str(tmp_path), place._replace(offset=place.offset - 5))
    with pytest.raises(UserError, match="damaged, or more than"):
        read_place(str(tmp_path), place._replace(length=place.length - 3))


def test_zipped_validation_set_stays_out_of_an_unpacked_training_tree(tree: Tree, tmp_path: Path) -> None:
    tree.many(2, combinations=0)
    other = type(tree)(tmp_path / "other")
    other.single("K-000009")
    zip_tree(other.root, tmp_path / "zips")
    (tmp_path / "zips/TS_1_단일.zip").rename(tree.root / "VS_1_단일.zip")
    result = build_manifest(tree.root, tmp_path / "out", num_photos=None, num_classes=None)
    assert result.report["found"] == {
        "num_photos": 48, "num_classes": 2, "num_combinations": 0, "trees": ["train"], "num_archives": 0,
    }  # fmt: skip
