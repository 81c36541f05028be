"""Hostile ZIP archives: no access outside the archive, bombs refused, refusals counted."""

from __future__ import annotations

import random
import stat
import time
import tracemalloc
import zipfile
from pathlib import Path

import pytest

from pillsnap.errors import UserError
from pillsnap.manifest.scan import scan
from pillsnap.photos import archives
from pillsnap.photos.archives import Place, locate, read_directory, read_place, to_location
from pillsnap.photos.decode import BadImage
from pillsnap.photos.files import PhotoStore
from pillsnap.synthetic.faults import png_header

NAME = "K-000001_0_2_0_0_75_{:03d}_200.png"


def test_unsafe_members_are_refused_and_counted(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "TS_1_단일.zip", "w") as archive:
        archive.writestr("K-000001/" + NAME.format(0), b"x")
        archive.writestr("../K-000001/" + NAME.format(20), b"x")
        archive.writestr("K-000001/../../" + NAME.format(40), b"x")
        archive.writestr("/K-000001/" + NAME.format(60), b"x")
        link = zipfile.ZipInfo("K-000001/" + NAME.format(80))
        link.create_system = 3
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr("K-000001/" + NAME.format(100), b"x" * 100, zipfile.ZIP_BZIP2)
    data = (tmp_path / "TS_1_단일.zip").read_bytes()
    start = data.rfind(b"PK\1\2")
    found = scan(tmp_path)
    assert [found.stem(i) for i in range(len(found))] == [NAME.format(0)[:-4]]
    assert found.refused.counts == {"unsafe_member_name": 3, "link": 1, "unknown_compression": 1}
    encrypted = bytearray(data)
    encrypted[start + 8] |= 1
    (tmp_path / "TS_1_단일.zip").write_bytes(encrypted)
    assert scan(tmp_path).refused.counts["encrypted_member"] == 1


def test_bomb_is_refused_in_little_time_and_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_MEMBER_BYTES", 1 << 20)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        archive.writestr("a.png", bytes(200 << 20))
    (place,) = locate(str(tmp_path), "a.zip", list(read_directory(tmp_path / "a.zip")))
    tracemalloc.start()
    start = time.perf_counter()
    with pytest.raises(UserError, match="more than"):
        read_place(str(tmp_path), place)
    assert time.perf_counter() - start < 0.5
    assert tracemalloc.get_traced_memory()[1] < 50 << 20
    tracemalloc.stop()


def test_directory_that_points_elsewhere_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.png", b"x")
    (member,) = read_directory(tmp_path / "a.zip")
    for lie in (
        member._replace(header_offset=5),
        member._replace(header_offset=1 << 40),
        member._replace(length=1 << 30),
    ):
        with pytest.raises(UserError):
            locate(str(tmp_path), "a.zip", [lie])


def test_damaged_directories_raise_nothing_but_user_errors(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(4):
            archive.writestr(f"약{number}/a.png", bytes(200))
    data, rng = (tmp_path / "a.zip").read_bytes(), random.Random(1)
    num_refused = 0
    for _ in range(2000):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(data.index(b"PK\1\2"), len(data))] = rng.choice((0, 255, rng.randrange(256)))
        (tmp_path / "b.zip").write_bytes(damaged[: rng.choice((len(data), rng.randrange(len(data))))])
        try:
            for place in locate(str(tmp_path), "b.zip", list(read_directory(tmp_path / "b.zip"))):
                read_place(str(tmp_path), place)
        except UserError:
            num_refused += 1
    assert 1000 < num_refused < 2000


def test_archive_that_is_a_link_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "a.zip").symlink_to(tmp_path / "secret")
    with pytest.raises(OSError, match="symbolic links"):
        read_place(str(tmp_path), Place("a.zip", 0, 6, 0))


def test_zipped_photo_that_is_a_bomb_is_refused_from_its_header(tmp_path: Path) -> None:
    """30,000 x 30,000 pixels, and a small image followed by 300 MB: neither is inflated."""
    headers = {"pixels.png": png_header(30_000, 30_000), "tail.png": png_header(20, 20)}
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, header in headers.items():
            with archive.open(name, "w") as member:
                member.write(header)
                for _ in range(300):
                    member.write(bytes(1 << 20))
    places = locate(str(tmp_path), "a.zip", list(read_directory(tmp_path / "a.zip")))
    for place, reason in zip(places, ("too_large", "corrupt"), strict=True):
        tracemalloc.start()
        start = time.perf_counter()
        with pytest.raises(BadImage, match=reason):
            PhotoStore(tmp_path).read(to_location(place))
        seconds, peak = time.perf_counter() - start, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 50e6
        assert reason == "corrupt" or seconds < 0.05
