"""Photos of every kind are read by import, audit and training alike, or left out by the import with a reason."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms

from pillsnap.manifest.audit.audit import audit
from pillsnap.photos.decode import DEFAULT_MAX_PIXELS
from pillsnap.photos.reader import PhotoReader
from tests.unit.manifest.formats.conftest import ROW, Load, save_photo, save_text

SIZE = (60, 40)
RNG = np.random.default_rng(0)
RGB = Image.fromarray(RNG.integers(0, 255, (40, 60, 3), dtype=np.uint8))
DEEP = RNG.integers(0, 65535, (40, 60, 3), dtype=np.uint16)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def lab() -> Image.Image:
    profiles = [ImageCms.createProfile(name) for name in ("sRGB", "LAB")]
    return ImageCms.applyTransform(RGB, ImageCms.buildTransform(*profiles, "RGB", "LAB"))  # type: ignore[return-value]


FRAMES = {"save_all": True, "append_images": [RGB.rotate(180)]}
READ = {
    "avif.avif": saved(RGB, "AVIF"),
    "animated.avif": saved(RGB, "AVIF", **FRAMES),
    "gray.tif": saved(Image.fromarray(DEEP[..., 0]), "TIFF"),
    "deep.tiff": cv2.imencode(".tiff", DEEP)[1].tobytes(),
    "cmyk.tif": saved(RGB.convert("CMYK"), "TIFF"),
    "lab.tif": saved(lab(), "TIFF"),
    "pages.tif": saved(RGB, "TIFF", **FRAMES),
    "jpeg.tif": saved(RGB, "TIFF", compression="jpeg"),
    "fax.tif": saved(RGB.convert("1"), "TIFF", compression="group4"),
    "two.mpo": saved(RGB, "MPO", **FRAMES),
    "palette.png": saved(RGB.convert("P"), "PNG"),
    "transparent.png": saved(RGB.convert("P"), "PNG", transparency=0),
    "deep.png": cv2.imencode(".png", DEEP)[1].tobytes(),
    "animated.png": saved(RGB, "PNG", **FRAMES),
    "cmyk.jpg": saved(RGB.convert("CMYK"), "JPEG"),
    "gray.jpg": saved(RGB.convert("L"), "JPEG"),
    "progressive.jpg": saved(RGB, "JPEG", progressive=True),
    "animated.gif": saved(RGB, "GIF", **FRAMES),
    "animated.webp": saved(RGB, "WEBP", **FRAMES),
    "alpha.webp": saved(RGB.convert("RGBA"), "WEBP"),
    "palette.bmp": saved(RGB.convert("P"), "BMP"),
}
REFUSED = {
    "photo.heic": ("not_an_image", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200)),
    "jpeg2000.jpg": ("not_an_image", saved(RGB, "JPEG2000")),
    "float.tif": ("corrupt", saved(Image.fromarray(RNG.random((40, 60)).astype(np.float32)), "TIFF")),
    "whole.tif": ("corrupt", saved(RGB.convert("I"), "TIFF")),
    "colours_float.tif": ("truncated", cv2.imencode(".tiff", RNG.random((40, 60, 3)).astype(np.float32))[1].tobytes()),
}


def test_what_the_import_accepts_is_read_in_training(
    tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # also where it is installed
    root = tmp_path / "set"
    save_photo(root / "images/val/v.jpg", SIZE)
    save_text(root / "labels/val/v.txt", ROW)
    for name, data in READ.items() | {(name, data) for name, (_, data) in REFUSED.items()}:
        stem = name.replace(".", "_")  # a label belongs to one photo
        path = root / f"images/train/{stem}.{name.rpartition('.')[2]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        save_text(root / f"labels/train/{stem}.txt", ROW)
    found = load(names=["x"])
    by_kind: dict[str, list[str]] = {}
    for name, (reason, _) in REFUSED.items():
        by_kind.setdefault(reason, []).append(f"images/train/{name.replace('.', '_')}.{name.rpartition('.')[2]}")
    assert {kind: sorted(listed) for kind, listed in found.problems.items()} == {
        kind: sorted(listed) for kind, listed in by_kind.items()
    }
    assert len(found.rows) == len(READ) + 1
    reader = PhotoReader(str(root), DEFAULT_MAX_PIXELS)
    for path, row in found.rows.items():
        pixels = reader.read(path)
        assert isinstance(pixels, np.ndarray), (path, pixels)
        assert pixels.shape == (40, 60, 3) == (row["height"], row["width"], 3), path
    for deep in (False, True):
        findings = audit(tmp_path / "out", root, deep=deep, num_workers=1).findings
        assert {each.kind for each in findings} & {*by_kind, "other_size", "unreadable_file"} == set()
