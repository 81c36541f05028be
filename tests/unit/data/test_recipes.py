"""Recipes: a batch repeats exactly; a bad photo is an invalid row with its reason."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pytest

from pillsnap.data.augment import CropJitter, FrameJitter
from pillsnap.data.plan import Slot
from pillsnap.data.recipes import CropRecipe, FrameRecipe
from pillsnap.data.sources import Source
from pillsnap.photos.reader import PhotoReader

BOX = [30.0, 20.0, 40.0, 30.0]


@pytest.fixture
def samples(tmp_path: Path) -> pa.Table:
    """Six photos: number 2 is truncated, number 3 is missing, number 4 is outside the data root."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(6):
        path = tmp_path / f"{number}.png"
        cv2.imwrite(str(path), rng.integers(0, 256, (80, 120, 3), dtype=np.uint8))
        rows.append({"sample_id": f"s{number}", "location": path.name, "boxes": [BOX], "box": BOX, "label": number})
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:500])
    (tmp_path / "3.png").unlink()
    rows[4]["location"] = "../4.png"
    return pa.Table.from_pylist(rows)


def slot(*members: int, training: bool = True, epoch: int = 0) -> Slot:
    return Slot(epoch, training, 0, np.array(members), np.full(len(members), epoch))


def test_crops_have_labels_and_unused_rows(samples: pa.Table, tmp_path: Path) -> None:
    recipe = CropRecipe(32, 0.1, CropJitter())
    batch = recipe.make(samples, slot(5, 0, 1), 1, 4, Source(PhotoReader(str(tmp_path), 10**6)))
    assert batch["image"].shape == (4, 32, 32, 3)
    assert batch["image"].dtype == np.uint8
    assert batch["valid"].tolist() == [True, True, True, False]
    assert batch["index"].tolist() == [5, 0, 1, -1]
    assert batch["label"][:3].tolist() == [5, 0, 1]


def test_unreadable_photos_are_listed_with_their_reason(samples: pa.Table, tmp_path: Path) -> None:
    source = Source(PhotoReader(str(tmp_path), 10**6))
    for recipe in (CropRecipe(32, 0.1, CropJitter()), FrameRecipe(64, FrameJitter(mosaic=1.0), 8, 10, 1)):
        batch = recipe.make(samples, slot(0, 2, 3, 4, 5), 1, 5, source)
        assert batch["valid"].tolist() == [True, False, False, False, True]
        assert batch["index"].tolist() == [0, 2, 3, 4, 5]
        reasons = dict(json.loads(str(batch["quarantine"])))
        assert list(reasons) == ["s2", "s3", "s4"]
        assert reasons["s2"].startswith("truncated")
        assert reasons["s3"].startswith("missing")
        assert "beneath the data root" in reasons["s4"]


def test_a_photo_above_the_pixel_limit_is_refused(samples: pa.Table, tmp_path: Path) -> None:
    batch = CropRecipe(32, 0.1, CropJitter()).make(samples, slot(0), 1, 1, Source(PhotoReader(str(tmp_path), 9_599)))
    assert not batch["valid"].any()
    assert "too_large" in str(batch["quarantine"])


def test_batches_repeat_exactly_and_change_with_the_epoch(samples: pa.Table, tmp_path: Path) -> None:
    source = Source(PhotoReader(str(tmp_path), 10**6))
    jitter = FrameJitter(
        mosaic=1.0, scale=0.5, translate=0.1, flip_horizontal=0.5, hue=0.1, saturation=0.5, brightness=0.4
    )
    for recipe in (CropRecipe(32, 0.1, CropJitter(0.1, 0.1, 180, 0.1, 0.2, 0.2)), FrameRecipe(64, jitter, 8, 10, 1)):
        first = recipe.make(samples, slot(0, 1, 5), 1, 3, source)
        again = recipe.make(samples, slot(0, 1, 5), 1, 3, source)
        later = recipe.make(samples, slot(0, 1, 5, epoch=1), 1, 3, source)
        for name in first.keys() - {"stage_s"}:  # times differ
            np.testing.assert_array_equal(first[name], again[name])
        assert not np.array_equal(first["image"], later["image"])


def test_mosaic_does_not_depend_on_the_number_of_workers(samples: pa.Table, tmp_path: Path) -> None:
    source = Source(PhotoReader(str(tmp_path), 10**6))
    recipe = FrameRecipe(64, FrameJitter(mosaic=1.0, scale=0.5), 2, 10, 1)
    whole = recipe.make(samples, slot(0, 1, 5, 0), 1, 4, source)
    halves = [recipe.make(samples, slot(*members), 1, 2, source) for members in ((0, 1), (5, 0))]
    for name in ("image", "boxes", "num_boxes"):
        np.testing.assert_array_equal(whole[name], np.concatenate([half[name] for half in halves]))


def test_validation_frames_are_plain_letterboxes(samples: pa.Table, tmp_path: Path) -> None:
    recipe = FrameRecipe(60, FrameJitter(mosaic=1.0, scale=0.5), 8, 10, 1)
    batch = recipe.make(samples, slot(0, training=False), 1, 1, Source(PhotoReader(str(tmp_path), 10**6)))
    np.testing.assert_allclose(batch["boxes"][0, 0], [15, 20, 20, 15])
    assert batch["num_boxes"].tolist() == [1]


def test_mosaic_ends_with_the_closing_epochs(samples: pa.Table, tmp_path: Path) -> None:
    recipe = FrameRecipe(60, FrameJitter(mosaic=1.0), 8, 3, 1)
    source = Source(PhotoReader(str(tmp_path), 10**6))
    closed = recipe.make(samples, slot(0, 1, epoch=3), 1, 2, source)
    plain = recipe.make(samples, slot(0, 1, training=False, epoch=3), 1, 2, source)
    np.testing.assert_array_equal(closed["image"], plain["image"])
    assert not np.array_equal(recipe.make(samples, slot(0, 1, epoch=2), 1, 2, source)["image"], plain["image"])


def test_areas_of_photos_with_unlabelled_pills_are_marked(samples: pa.Table, tmp_path: Path) -> None:
    """Photo 0 is black and incomplete, the others are white: the marked areas are the black ones."""
    for number in (0, 1, 5):
        cv2.imwrite(str(tmp_path / f"{number}.png"), np.full((80, 120, 3), 0 if number == 0 else 255, np.uint8))
    samples = samples.append_column("complete", pa.array([number != 0 for number in range(6)]))
    source = Source(PhotoReader(str(tmp_path), 10**6))
    jitter = FrameJitter(mosaic=1.0, scale=0.3, flip_horizontal=0.5, flip_vertical=0.5)
    plain, marking = (FrameRecipe(64, jitter, 3, 2, 1, mark_incomplete=mark) for mark in (False, True))
    assert repr(plain) == repr(marking)
    seen = 0
    for epoch in range(3):  # the last without mosaic
        batch = marking.make(samples, slot(0, 1, 5, epoch=epoch), 1, 4, source)
        assert "unsure" not in plain.make(samples, slot(0, 1, 5, epoch=epoch), 1, 4, source)
        assert not batch["unsure"][3].any()
        for image, areas in zip(batch["image"][:3], batch["unsure"], strict=False):
            marked = np.zeros((64, 64), bool)
            for x, y, width, height in areas.round().astype(int):
                marked[y : y + height, x : x + width] = True
            black = (image == 0).all(2)
            assert (black & ~marked).sum() <= 64 and (marked & ~black).mean() < 0.1  # the edge is half a pixel off
            seen += int(black.any())
    assert seen >= 3
    validated = marking.make(samples, slot(1, training=False), 1, 1, source)
    assert not validated["unsure"].any()


def test_sample_that_comes_twice_is_augmented_anew(samples: pa.Table, tmp_path: Path) -> None:
    source = Source(PhotoReader(str(tmp_path), 10**6))
    for recipe in (CropRecipe(32, 0.1, CropJitter(rotation_deg=180)), FrameRecipe(64, FrameJitter(scale=0.5), 8, 0, 1)):
        members = np.array([5, 0, 5, 5])
        batch = recipe.make(samples, Slot(1, True, 0, members, np.array([1, 2, 2, 1])), 1, 4, source)
        assert batch["index"].tolist() == [5, 0, 5, 5] and batch["valid"].all()
        first, _, again, same = batch["image"]
        np.testing.assert_array_equal(first, same)
        assert np.abs(first.astype(int) - again).mean() > 5
