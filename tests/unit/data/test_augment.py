"""Geometry: boxes stay on their pills through every warp, and randomness is a function of seed, epoch and sample."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from pillsnap.data import augment
from pillsnap.data.augment import CropJitter, FrameJitter


def photo_with_pill(
    width: int = 400, height: int = 300, box: tuple[int, int, int, int] = (120, 80, 60, 40)
) -> tuple[np.ndarray, np.ndarray]:
    image = np.full((height, width, 3), 60, np.uint8)
    x, y, w, h = box
    image[y : y + h, x : x + w] = (250, 240, 30)
    return image, np.array([box], np.float32)


def bright_box(image: np.ndarray) -> np.ndarray:
    ys, xs = np.nonzero(image[..., 0] > 155)
    return np.array([xs.min(), ys.min(), xs.max() + 1 - xs.min(), ys.max() + 1 - ys.min()], np.float64)


def test_letterbox_keeps_the_box_on_the_pill() -> None:
    image, boxes = photo_with_pill()
    frame = augment.letterbox(image, 200)
    mapped = augment.transform_boxes(boxes, augment.letterbox_matrix(400, 300, 200))[0]
    np.testing.assert_allclose(mapped, [60, 65, 30, 20])
    assert np.abs(bright_box(frame) - mapped).max() <= 1
    assert (frame[:20] == augment.PADDING_GREY).all()


def test_letterbox_of_odd_sizes_stays_within_a_pixel() -> None:
    image, boxes = photo_with_pill(977, 1281, (401, 603, 203, 155))
    mapped = augment.transform_boxes(boxes, augment.letterbox_matrix(977, 1281, 320))[0]
    assert np.abs(bright_box(augment.letterbox(image, 320)) - mapped).max() <= 1


@pytest.mark.parametrize("seed", range(20))
def test_jittered_frame_keeps_the_box_on_the_pill(seed: int) -> None:
    image, boxes = photo_with_pill()
    jitter = FrameJitter(scale=0.3, translate=0.1, flip_horizontal=0.5, flip_vertical=0.5)
    frame, found = augment.frame_sample([image], [boxes], 256, jitter, np.random.default_rng(seed))
    assert len(found) == 1
    assert np.abs(bright_box(frame) - found[0]).max() <= 1.5


@pytest.mark.parametrize("seed", range(20))
def test_rotated_box_holds_the_pill(seed: int) -> None:
    image, boxes = photo_with_pill(box=(170, 130, 60, 40))
    frame, found = augment.frame_sample(
        [image], [boxes], 256, FrameJitter(rotation_deg=180), np.random.default_rng(seed)
    )
    bright, box = bright_box(frame), found[0]
    assert (bright[:2] >= box[:2] - 1.5).all()
    assert (bright[:2] + bright[2:] <= box[:2] + box[2:] + 1.5).all()
    assert box[2] * box[3] <= 1.7 * bright[2] * bright[3]


def test_mosaic_holds_every_visible_pill_of_four_photos() -> None:
    image, boxes = photo_with_pill()
    for seed in range(20):
        frame, found = augment.frame_sample(
            [image] * 4, [boxes] * 4, 320, FrameJitter(scale=0.4, translate=0.1), np.random.default_rng(seed)
        )
        pills = cv2.connectedComponents((frame[..., 0] > 155).astype(np.uint8))[0] - 1
        assert len(found) <= pills <= 4
        for x, y, w, h in found.round().astype(int):
            assert frame[y : y + h, x : x + w, 0].mean() > 180


def test_boxes_mostly_outside_are_dropped() -> None:
    image, _ = photo_with_pill()
    boxes = np.array([[-95, 10, 100, 100], [10, 10, 1, 1], [100, 100, 50, 50]], np.float32)
    _, found = augment.frame_sample([image], [boxes], 400, FrameJitter(), np.random.default_rng(0))
    np.testing.assert_allclose(found, [[100, 150, 50, 50]], atol=1e-3)


def test_crop_centres_the_pill_at_the_stated_scale() -> None:
    image, boxes = photo_with_pill()
    patch = augment.crop(image, boxes[0], 128, 0.25, CropJitter(), np.random.default_rng(0))
    x, y, w, h = bright_box(patch)
    side = 60 * 1.5
    assert w == pytest.approx(60 / side * 128, abs=1.5)
    assert h == pytest.approx(40 / side * 128, abs=1.5)
    assert (x + w / 2, y + h / 2) == pytest.approx((64, 64), abs=1)


def test_crops_are_never_mirrored() -> None:
    image = np.zeros((200, 200, 3), np.uint8)
    cv2.putText(image, "F7", (60, 120), cv2.FONT_HERSHEY_SIMPLEX, 2, (255, 255, 255), 6)
    box = np.array([50, 60, 100, 80])
    plain = augment.crop(image, box, 96, 0.2, CropJitter(), np.random.default_rng(0)).astype(int)[..., 0]
    turned = augment.crop(image, box, 96, 0.2, CropJitter(rotation_deg=180), np.random.default_rng(3)).astype(
        np.float32
    )[..., 0]

    def best_match(reference: np.ndarray) -> float:
        scores = []
        for angle in range(0, 360, 3):
            matrix = cv2.getRotationMatrix2D((47.5, 47.5), angle, 1)
            candidate = cv2.warpAffine(turned, matrix, (96, 96))
            scores.append(np.corrcoef(candidate[20:76, 20:76].ravel(), reference[20:76, 20:76].ravel())[0, 1])
        return max(scores)

    assert best_match(plain) > 0.9
    assert best_match(plain[:, ::-1]) < 0.8


def test_sample_rng_depends_only_on_seed_epoch_and_sample() -> None:
    draws = {
        (seed, epoch, name): augment.sample_rng(seed, epoch, name).integers(2**62)
        for seed in (1, 2)
        for epoch in (0, 1)
        for name in ("a", "b", "1/a")
    }
    assert len(set(draws.values())) == len(draws)
    assert augment.sample_rng(1, 0, "a").integers(2**62) == draws[1, 0, "a"]


def test_erasing_fills_a_rectangle_of_some_crops_only() -> None:
    image = np.full((200, 200, 3), 90, np.uint8)
    box = np.array([50, 50, 100, 100], np.float32)
    plain, erasing = CropJitter(rotation_deg=180), CropJitter(rotation_deg=180, erase=0.4)
    shares = []
    for number in range(300):
        crops = [
            augment.crop(image, box, 64, 0.1, jitter, augment.sample_rng(7, 1, f"p{number}"))
            for jitter in (plain, erasing, erasing)
        ]
        assert (crops[1] == crops[2]).all()
        changed = (crops[0] != crops[1]).any(2)
        if changed.any():
            rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
            assert changed[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
            assert len(np.unique(crops[1][changed], axis=0)) == 1
            shares.append(changed.mean())
    assert 0.3 < len(shares) / 300 < 0.5
    assert min(shares) >= 0.015 and 0.19 < max(shares) <= 0.21
