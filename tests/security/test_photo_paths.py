"""Photo paths of the training stream: nothing outside the data root, no links, no hanging, no excessive memory."""

from __future__ import annotations

import os
import socket
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest

from pillsnap.photos import files
from pillsnap.photos.archives import Place, locate, read_directory, to_location
from pillsnap.photos.decode import BadImage
from pillsnap.photos.files import PhotoStore
from pillsnap.photos.reader import PhotoReader

PIXELS = np.full((12, 10, 3), 200, np.uint8)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data root with one photo, a photo outside it, and a folder outside it with another."""
    root = tmp_path / "root"
    (root / "photos").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    for path in (root / "photos/good.png", tmp_path / "secret.png", tmp_path / "outside/secret.png"):
        cv2.imwrite(str(path), PIXELS)
    return root


def reason(root: Path, location: str) -> str:
    """Reason for quarantining this photo; empty when it can be read."""
    found = PhotoReader(str(root), 10**6).read(location)
    return found.reason if isinstance(found, BadImage) else ""


def test_a_photo_in_the_root_is_read(root: Path) -> None:
    assert reason(root, "photos/good.png") == ""


@pytest.mark.parametrize(
    "path",
    [
        "../secret.png", "photos/../../secret.png", "/etc/passwd", "a\0b.png", "", "..\\secret.png", "photos/..",
        "../x.zip::0:10:0", "/x.zip::0:10:0",
    ],
)  # fmt: skip
def test_paths_out_of_the_root_are_refused(root: Path, path: str) -> None:
    assert reason(root, path) == "outside_root"


def test_an_absolute_path_into_the_root_is_refused(root: Path) -> None:
    assert reason(root, str(root / "photos/good.png")) == "outside_root"


@pytest.mark.timeout(10)
def test_links_fifos_sockets_and_folders_are_refused_at_once(root: Path, tmp_path: Path) -> None:
    (root / "photos/out.png").symlink_to(tmp_path / "secret.png")
    (root / "photos/in.png").symlink_to(root / "photos/good.png")
    (root / "photos/loop.png").symlink_to(root / "photos/loop.png")
    (root / "photos/nowhere.png").symlink_to("nowhere")
    os.mkfifo(root / "photos/fifo.png")
    (root / "photos/folder.png").mkdir()
    here = os.getcwd()
    os.chdir(root / "photos")  # a socket's path may have 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("socket.png")
    finally:
        os.chdir(here)
    found = {path.stem: reason(root, f"photos/{path.name}") for path in sorted((root / "photos").iterdir())}
    assert found == {
        "good": "", "out": "link", "in": "link", "loop": "link", "nowhere": "link", "fifo": "not_a_file",
        "folder": "not_a_file", "socket": "not_a_file",
    }  # fmt: skip


def test_folder_links_out_of_the_root_are_refused_except_at_common_levels(root: Path, tmp_path: Path) -> None:
    (root / "elsewhere").symlink_to(tmp_path / "outside")
    (root / "inside").symlink_to(root / "photos")
    (root / "photos/loop").symlink_to(root)
    (root / "round").symlink_to(root / "round")
    (root / "images").symlink_to(root)
    (root / "TS_1_single").symlink_to(tmp_path / "outside")
    assert reason(root, "elsewhere/secret.png") == "outside_root"
    assert reason(root, "inside/good.png") == ""
    assert reason(root, "TS_1_single/secret.png") == ""  # parts of the set lie on other disks
    for loop in ("photos/loop/photos/good.png", "images/images/photos/good.png", "round/a.png"):
        assert reason(root, loop) == "link"


def test_a_file_too_large_to_be_a_photo_is_not_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (root / "photos/huge.png").open("wb") as file:
        file.truncate(1 << 40)
    assert reason(root, "photos/huge.png") == "too_large"


def test_a_file_that_may_not_be_read_says_so(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.os, "open", refuse)
    with pytest.raises(BadImage, match="unreadable_file: Permission denied"):
        PhotoStore(root).read("photos/good.png")


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zipped_photos_are_read_and_false_locations_refused(root: Path, tmp_path: Path, compression: int) -> None:
    with zipfile.ZipFile(root / "a.zip", "w", compression) as archive:
        archive.write(root / "photos/good.png", "good.png")
    (place,) = locate(str(root), "a.zip", list(read_directory(root / "a.zip")))
    assert PhotoStore(root).read(to_location(place)) == (root / "photos/good.png").read_bytes()
    (root / "link.zip").symlink_to(root / "a.zip")
    cases = {
        "missing": place._replace(archive="b.zip"),
        "link": place._replace(archive="link.zip"),
        "truncated": place._replace(offset=1 << 40),
        "too_large": place._replace(length=1 << 40),
        "outside_root": place._replace(archive="../a.zip"),
    }
    for expected, lie in cases.items():
        assert reason(root, to_location(lie)) == expected
    assert reason(root, to_location(Place("a.zip", 3, 20, 8))) == "corrupt"
    assert reason(root, to_location(Place("a.zip", 3, 20, 0))) == "not_an_image"


@pytest.mark.parametrize("location", ["photos/good.png", "zipped"])
def test_a_remote_root_is_read_the_same(root: Path, location: str) -> None:
    with zipfile.ZipFile(root / "a.zip", "w") as archive:
        archive.write(root / "photos/good.png", "good.png")
    (place,) = locate(str(root), "a.zip", list(read_directory(root / "a.zip")))
    location = to_location(place) if location == "zipped" else location
    store = PhotoStore(f"file://{root}")
    assert store.read(location) == (root / "photos/good.png").read_bytes()
    with pytest.raises(BadImage, match="missing"):
        store.read("photos/none.png")
    with pytest.raises(BadImage, match="outside_root"):
        store.read("../secret.png")
