"""Windows: crops from a window equal crops from the photo, and jitter stays inside it."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import cv2
import numpy as np
import pytest

from pillsnap.data import augment
from pillsnap.data.augment import CropJitter
from pillsnap.data.windows import Codec, EncodedWindow, Window, crop_window, frame_window
from pillsnap.manifest.table import read_manifest
from pillsnap.photos.decode import BadImage, decode_image

MARGIN = 0.12
JITTER = CropJitter(center=0.06, scale=0.12, rotation_deg=180.0)


def smooth_photo(width: int = 640, height: int = 800) -> np.ndarray:
    noise = np.random.default_rng(3).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)


def fine_photo() -> np.ndarray:
    """Smooth light and fine dark strokes, as of an imprint."""
    photo = smooth_photo() // 4 + 140
    for number in range(10):
        cv2.line(photo, (100 + 40 * number, 180), (140 + 40 * number, 520), (60, 60, 70), 10, cv2.LINE_AA)
    return photo


@pytest.mark.parametrize("box", [(300, 400, 120, 90), (0, 0, 60, 60), (560, 700, 100, 120), (5, 300, 300, 20)])
@pytest.mark.parametrize("size_px", [32, 96, 224])
def test_crops_from_an_exact_window_are_the_crops_from_the_photo(box: tuple[int, ...], size_px: int) -> None:
    photo, target = smooth_photo(), np.array(box, np.float32)
    window = crop_window(Window(photo), target, size_px, MARGIN, JITTER, "png").encode("png").decode(10**7)
    for seed in range(20):
        direct = augment.crop(photo, target, size_px, MARGIN, JITTER, np.random.default_rng(seed))
        stored = augment.crop(
            window.pixels, window.map_boxes(target), size_px, MARGIN, JITTER, np.random.default_rng(seed)
        )
        difference = np.abs(direct.astype(int) - stored)
        assert difference.max() <= 1, (seed, difference.max())  # the warp rounds coordinates to 1/32 px
        assert difference.mean() < 0.01


def test_crops_from_a_small_window_are_close(toy_manifest: Path, toy_tree: Path) -> None:
    errors = []
    for row in read_manifest(toy_manifest).to_pylist()[:12]:
        photo = decode_image((toy_tree / row["image_path"]).read_bytes())
        target = np.array(row["boxes"][0], np.float32)
        window = crop_window(Window(photo), target, 96, MARGIN, JITTER, "jpeg").encode("jpeg").decode(10**7)
        for seed in range(5):
            direct = augment.crop(photo, target, 96, MARGIN, JITTER, np.random.default_rng(seed)).astype(int)
            stored = augment.crop(
                window.pixels, window.map_boxes(target), 96, MARGIN, JITTER, np.random.default_rng(seed)
            )
            errors.append(np.abs(direct - stored).mean())
    assert np.mean(errors) < 2.0, np.mean(errors)  # of 255


def test_window_is_no_larger_than_the_reach_of_its_crops() -> None:
    photo = np.zeros((4000, 4000, 3), np.uint8)
    box = np.array((1900, 1900, 200, 100), np.float32)
    side = 200 * (1 + 2 * MARGIN)
    still = crop_window(Window(photo), box, 224, MARGIN, CropJitter(), "png").pixels.shape
    assert still[:2] == (256, 256)  # 248 px, widened by two and laid on the grid of eight
    turning = crop_window(Window(photo), box, 224, MARGIN, JITTER, "png").pixels.shape[0]
    reach = 2 * side * np.exp(0.12) * (np.sqrt(0.5) + 0.06)
    assert reach <= turning <= reach + 2 * 8 + 4 + 1
    reduced = crop_window(Window(photo), box, 224, MARGIN, JITTER, "jpeg")
    assert reduced.pixels.shape[0] == pytest.approx(turning * 224 / side, abs=1)
    assert reduced.scale_x == pytest.approx(224 / side, abs=0.002)
    fine = crop_window(Window(photo), box, 96, MARGIN, JITTER, "jpeg2x")
    assert fine.scale_x == pytest.approx(2 * 96 / side, abs=0.002)
    assert fine.pixels.shape[0] == pytest.approx(turning * 2 * 96 / side, abs=1)
    assert crop_window(Window(photo), box, 224, MARGIN, JITTER, "jpeg2x").scale_x == 1.0  # never enlarged


def test_crops_of_twice_the_detail_are_those_of_the_photo() -> None:
    """Mean difference of 255 between crops from the store and from a photo with large pills of fine structure."""
    photo, target = fine_photo(), np.array((150, 200, 300, 260), np.float32)
    errors = {}
    for codec in get_args(Codec):
        window = crop_window(Window(photo), target, 96, MARGIN, JITTER, codec).encode(codec).decode(10**7)
        stored, direct = (
            np.stack([augment.crop(p, box, 96, MARGIN, JITTER, np.random.default_rng(seed)) for seed in range(12)])
            for p, box in ((window.pixels, window.map_boxes(target)), (photo, target))
        )
        errors[codec] = np.abs(stored.astype(int) - direct).mean()
    assert errors["png"] < 0.01
    assert errors["jpeg2x"] < 4.5 and errors["jpeg2x"] < 0.65 * errors["jpeg"], errors


def test_frames_are_halved_while_they_keep_the_size() -> None:
    photo = smooth_photo(488, 640)
    assert frame_window(Window(photo), 640).pixels.shape == (640, 488, 3)
    half = frame_window(Window(photo), 320)
    assert half.pixels.shape == (320, 244, 3)
    np.testing.assert_array_equal(half.pixels, cv2.resize(photo, (244, 320), interpolation=cv2.INTER_AREA))
    np.testing.assert_allclose(half.map_boxes(np.array([[10, 20, 30, 40]])), [[5, 10, 15, 20]])
    assert frame_window(Window(photo), 100).scale_x == 0.25
    # A letterbox of half the size is the same from the photo and from its half.
    np.testing.assert_array_equal(augment.letterbox(photo, 320), augment.letterbox(half.pixels, 320))


def test_boxes_are_mapped_into_the_window() -> None:
    window = Window(np.zeros((10, 10, 3), np.uint8), left=16, top=8, scale_x=0.5, scale_y=0.25)
    np.testing.assert_allclose(window.map_boxes(np.array([20, 12, 8, 8])), [2, 1, 4, 2])


def test_bytes_that_are_no_image_are_refused() -> None:
    with pytest.raises(BadImage, match="corrupt"):
        EncodedWindow(b"nothing").decode(10**6)
    with pytest.raises(BadImage, match="not_an_image"):
        EncodedWindow(b"nothing", own=False).decode(10**6)
