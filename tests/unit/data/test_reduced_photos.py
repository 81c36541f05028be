"""Large JPEG photos are decoded at the size that a task needs: same samples, same boxes, same in the store."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pytest

from pillsnap.data import windows
from pillsnap.data.augment import CropJitter, FrameJitter
from pillsnap.data.plan import Slot
from pillsnap.data.recipes import CropRecipe, FrameRecipe
from pillsnap.data.sources import FetchTimes, ShippedSource, Source, SplitStore
from pillsnap.data.store.shards import ShardStore
from pillsnap.photos.decode import decode_image
from pillsnap.photos.reader import PhotoReader

BOXES = [[200.0, 160.0, 420.0, 300.0], [900.0, 500.0, 180.0, 200.0]]
CROPS = CropRecipe(64, 0.1, CropJitter(0.06, 0.12, 180.0))
FRAMES = FrameRecipe(160, FrameJitter(mosaic=1.0, scale=0.5, translate=0.1, flip_horizontal=0.5), 4, 9, 4)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A photo of 1280 x 960 with two pills, as JPEG and PNG of the same pixels."""
    rng = np.random.default_rng(4)
    photo = cv2.resize(rng.integers(60, 130, (24, 32, 3), dtype=np.uint8), (1280, 960), interpolation=cv2.INTER_CUBIC)
    for x, y, width, height in np.array(BOXES, int):
        photo[y : y + height, x : x + width] = (90, 200, 30)  # BGR
    _, data = cv2.imencode(".jpg", photo, [cv2.IMWRITE_JPEG_QUALITY, 95])
    (tmp_path / "large.jpg").write_bytes(data.tobytes())
    cv2.imwrite(str(tmp_path / "large.png"), decode_image(data.tobytes())[..., ::-1])
    return tmp_path


def crop_samples(name: str) -> pa.Table:
    return pa.table({"sample_id": ["a#0", "a#1"], "location": [name] * 2, "box": BOXES, "label": [0, 1]})


def frame_samples(name: str) -> pa.Table:
    return pa.table({"sample_id": ["a"], "location": [name], "boxes": [BOXES], "complete": [True]})


@pytest.fixture
def reductions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The reduction of every photo that is decoded."""
    seen: list[int] = []

    def decode(data: bytes, *, max_pixels: int, reduction: int = 1) -> np.ndarray:
        seen.append(reduction)
        return decode_image(data, max_pixels=max_pixels, reduction=reduction)

    monkeypatch.setattr(windows, "decode_image", decode)
    return seen


def difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(int) - other).mean())


@pytest.mark.parametrize("training", [True, False])
def test_crops_are_those_of_the_whole_photo(root: Path, training: bool, reductions: list[int]) -> None:
    source = Source(PhotoReader(str(root), 10**7))
    slot = Slot(0, training, 0, np.array([0, 1]), np.zeros(2, int))
    small, large = (CROPS.make(crop_samples(name), slot, 1, 2, source)["image"] for name in ("large.jpg", "large.png"))
    # 64 of 420 * 1.2 px enlarged by 1.13: a quarter; of 200 * 1.2 px: a half, without jitter too.
    assert reductions == [4, 2, 1, 1]
    assert difference(small, large) < 2


@pytest.mark.parametrize("training", [True, False])
def test_frames_are_those_of_the_whole_photo(root: Path, training: bool, reductions: list[int]) -> None:
    source = Source(PhotoReader(str(root), 10**7))
    for epoch in (0, 20):  # with and without mosaic
        slot = Slot(epoch, training, 0, np.array([0]), np.array([epoch]))
        small, large = (FRAMES.make(frame_samples(name), slot, 1, 1, source) for name in ("large.jpg", "large.png"))
        np.testing.assert_allclose(small["boxes"], large["boxes"], atol=1e-3)
        assert small["num_boxes"] == large["num_boxes"]
        assert difference(small["image"], large["image"]) < 2
    # 160 of 1280 px is an eighth, enlarged by up to 1.5 a quarter.
    assert reductions == [4 if training else 8, 1] * 2


@pytest.mark.parametrize("codec", ["png", "jpeg"])
def test_store_keeps_what_the_direct_path_makes(root: Path, codec: windows.Codec, reductions: list[int]) -> None:
    samples, reader = crop_samples("large.jpg"), PhotoReader(str(root), 10**7)
    store = SplitStore(ShardStore(str(root / codec)), CROPS, codec, training=True)
    filling = store.source(reader)
    for number in (0, 1):
        filling.fetch(samples, number)
    filling.flush()
    assert reductions == [4, 2]
    kept = store.source(PhotoReader("/nowhere", 10**7))
    sent = {number: kept.fetch(samples, number) for number in (0, 1)}
    slot = Slot(0, True, 0, np.array([0, 1]), np.zeros(2, int))
    direct = CROPS.make(samples, slot, 1, 2, Source(reader))["image"]
    stored = CROPS.make(samples, slot, 1, 2, kept)["image"]
    shipped = CROPS.make(samples, slot, 1, 2, ShippedSource(reader, shipped=sent, store=kept))["image"]
    np.testing.assert_array_equal(stored, shipped)
    if codec == "png":  # the warp rounds coordinates to 1/32 px
        assert np.abs(stored.astype(int) - direct).max() <= 1
    else:
        assert difference(stored, direct) < 3  # the JPEG of the crop, of strong colours


def test_shipped_photo_is_decoded_as_the_read_one(root: Path) -> None:
    samples, reader = crop_samples("large.jpg"), PhotoReader(str(root), 10**7)
    direct = Source(reader)
    slot = Slot(0, True, 0, np.array([0, 1]), np.zeros(2, int))
    sent = {number: direct.fetch(samples, number) for number in (0, 1)}
    shipped = ShippedSource(reader, shipped=sent, store=Source(PhotoReader("/nowhere", 10**7)))
    one, other = (CROPS.make(samples, slot, 1, 2, source)["image"] for source in (direct, shipped))
    np.testing.assert_array_equal(one, other)


def test_window_maps_boxes_of_a_reduced_photo_exactly(root: Path) -> None:
    source = Source(PhotoReader(str(root), 10**7))
    samples = frame_samples("large.jpg")
    window = source.window(samples, 0, FetchTimes(), FRAMES.needed(samples, 0, training=True))
    assert isinstance(window, windows.Window)
    assert (window.left, window.top, window.scale_x, window.scale_y) == (0, 0, 0.25, 0.25)
    np.testing.assert_array_equal(window.map_boxes(np.array(BOXES)), np.array(BOXES) / 4)
    green = np.abs(window.pixels.astype(int) - (30, 200, 90)).max(axis=2) < 30
    assert green[40:115, 50:155].mean() > 0.99 and not green[:39].any() and not green[:, :49].any()
