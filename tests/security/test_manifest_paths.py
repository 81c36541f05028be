"""Hostile trees and label files: no reads outside the root, no hangs, all refusals counted."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pillsnap.manifest.import_folder import ImportOptions, import_folder
from pillsnap.manifest.labels import read_label
from pillsnap.manifest.scan import scan

STEM = "K-000001_0_2_0_0_75_{:03d}_200"


@pytest.fixture
def leaf(tmp_path: Path) -> Path:
    """A drug's folder with one good photo."""
    folder = tmp_path / "root/train/images/single/TS_1_single/K-000001"
    folder.mkdir(parents=True)
    (folder / f"{STEM.format(0)}.png").write_bytes(b"x")
    return folder


def test_photo_links_fifos_and_folders_are_refused(leaf: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"secret")
    (leaf / f"{STEM.format(20)}.png").symlink_to(secret)
    (leaf / f"{STEM.format(40)}.png").symlink_to(leaf / f"{STEM.format(0)}.png")
    (leaf / f"{STEM.format(60)}.png").symlink_to("nowhere")
    os.mkfifo(leaf / f"{STEM.format(80)}.png")
    (leaf / f"{STEM.format(100)}.png").mkdir()
    found = scan(tmp_path / "root")
    assert [found.stem(i) for i in range(len(found))] == [STEM.format(0)]
    assert found.refused.counts == {"link": 3, "not_a_file": 2}
    assert f"train/images/single/TS_1_single/K-000001/{STEM.format(20)}.png" in found.refused.examples["link"]


def test_drug_folder_that_is_a_link_is_refused(leaf: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "K-000002_0_2_0_0_75_000_200.png").write_bytes(b"x")
    (leaf.parent / "K-000002").symlink_to(outside)
    found = scan(tmp_path / "root")
    assert len(found) == 1
    assert found.refused.counts == {"link": 1}


def test_link_loops_end(leaf: Path, tmp_path: Path) -> None:
    (leaf.parents[1] / "TS_2_single").symlink_to(leaf.parents[1])
    (leaf.parents[1] / "TS_3_single").symlink_to(tmp_path / "root")
    (leaf / "loop").symlink_to(leaf)
    found = scan(tmp_path / "root")
    assert len(found) == 1


@pytest.mark.timeout(10)
def test_label_links_and_fifos_are_refused_at_once(tmp_path: Path) -> None:
    good = tmp_path / "good.json"
    good.write_text(json.dumps({"images": [{}], "annotations": [{"bbox": [1, 2, 3, 4]}]}))
    assert read_label(str(good), "K-000001").problem == ""
    (tmp_path / "link.json").symlink_to(good)
    os.mkfifo(tmp_path / "fifo.json")
    assert read_label(str(tmp_path / "link.json"), "K-000001").problem == "not_a_file"
    assert read_label(str(tmp_path / "fifo.json"), "K-000001").problem == "not_a_file"


def test_yolo_photo_links_are_left_out(tmp_path: Path) -> None:
    import cv2
    import numpy as np

    images, labels = tmp_path / "set/images/train", tmp_path / "set/labels/train"
    images.mkdir(parents=True)
    labels.mkdir(parents=True)
    cv2.imwrite(str(images / "a.png"), np.zeros((8, 8, 3), np.uint8))
    (images / "b.png").symlink_to(images / "a.png")
    os.mkfifo(images / "c.png")
    cv2.imwrite(str(images / "d.png"), np.ones((8, 8, 3), np.uint8))
    for name in "abcd":
        (labels / f"{name}.txt").write_text("0 0.5 0.5 0.5 0.5")
    import_folder(tmp_path / "set", tmp_path / "out", ImportOptions(["x"], val_fraction=0.5))
    report = json.loads((tmp_path / "out/import_report.json").read_text())
    assert report["num_train"] == 1
    assert report["problems"]["link_or_not_a_file"]["listed"] == ["images/train/b.png", "images/train/c.png"]


def test_names_that_are_not_utf8_are_refused_and_escaped(leaf: Path, tmp_path: Path) -> None:
    odd = leaf.parent / os.fsdecode(b"K-\xff")
    odd.mkdir()
    (odd / "K-000001_0_2_0_0_75_020_200.png").write_bytes(b"x")
    (leaf / os.fsdecode(b"\xfe.png")).write_bytes(b"x")
    found = scan(tmp_path / "root")
    assert len(found) == 1
    assert found.refused.counts == {"stray_image": 1, "unreadable_name": 1}
    assert found.refused.examples["unreadable_name"] == ["train/images/single/TS_1_single/K-\\udcff"]


def test_yolo_names_that_are_not_utf8_are_left_out(tmp_path: Path) -> None:
    import cv2
    import numpy as np

    images, labels = tmp_path / "set/images/train", tmp_path / "set/labels/train"
    images.mkdir(parents=True)
    labels.mkdir(parents=True)
    cv2.imwrite(str(images / "a.png"), np.zeros((8, 8, 3), np.uint8))
    cv2.imwrite(str(images / "b.png"), np.ones((8, 8, 3), np.uint8))
    for name in "ab":
        (labels / f"{name}.txt").write_text("0 0.5 0.5 0.5 0.5")
    (images / os.fsdecode(b"\xff.png")).write_bytes((images / "a.png").read_bytes())
    (images / "two\nlines.png").write_bytes((images / "a.png").read_bytes())
    import_folder(tmp_path / "set", tmp_path / "out", ImportOptions(["x"], val_fraction=0.5))
    report = json.loads((tmp_path / "out/import_report.json").read_text())
    assert report["problems"]["unreadable_name"]["count"] == 2
