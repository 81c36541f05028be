"""Sources: a window has the same pixels from the store and from the photo, and is made once."""

from __future__ import annotations

import threading
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pytest

from pillsnap.data import windows
from pillsnap.data.augment import CropJitter
from pillsnap.data.recipes import CropRecipe
from pillsnap.data.sources import FetchTimes, KeyMemo, ShippedSource, Source, SplitStore
from pillsnap.data.store.shards import ShardStore
from pillsnap.data.windows import Window
from pillsnap.photos.decode import BadImage, decode_image
from pillsnap.photos.files import PhotoStore
from pillsnap.photos.reader import PhotoReader
from pillsnap.storage import Storage

RECIPE = CropRecipe(32, 0.1, CropJitter(0.1, 0.1, 180.0))


@pytest.fixture
def samples(tmp_path: Path) -> pa.Table:
    """Two pills on one photo, one on a photo that is not there."""
    picture = np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "a.png"), picture)
    boxes = [[10.0, 20.0, 40.0, 30.0], [80.0, 60.0, 30.0, 40.0], [0.0, 0.0, 9.0, 9.0]]
    return pa.table({"sample_id": ["a#0", "a#1", "b#0"], "location": ["a.png", "a.png", "b.png"], "box": boxes})


def test_pixels_are_the_same_with_and_without_the_store(samples: pa.Table, tmp_path: Path) -> None:
    store = SplitStore(ShardStore(str(tmp_path / "store")), RECIPE, "jpeg", training=True)
    made = store.source(PhotoReader(str(tmp_path), 10**6))
    first = [made.window(samples, number, FetchTimes()) for number in range(3)]
    made.flush()
    (shard,) = store.shards.shards()
    made.flush()  # nothing new: no second shard
    assert list(store.shards.shards()) == [shard]
    kept = store.source(PhotoReader("/nowhere", 10**6))
    for number in (0, 1):
        one, other = first[number], kept.window(samples, number, FetchTimes())
        assert isinstance(one, Window)
        assert isinstance(other, Window)
        np.testing.assert_array_equal(one.pixels, other.pixels)
        assert (one.left, one.top, one.scale_x, one.scale_y) == (other.left, other.top, other.scale_x, other.scale_y)
    assert kept.fresh == []
    bad = first[2]
    assert isinstance(bad, BadImage)
    assert bad.reason == "missing"


def test_a_photo_of_several_pills_is_decoded_once(
    samples: pa.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[bytes] = []

    def decode(data: bytes, **options: int) -> np.ndarray:
        decoded.append(data)
        return decode_image(data, **options)

    monkeypatch.setattr(windows, "decode_image", decode)
    store = SplitStore(ShardStore(str(tmp_path / "store")), RECIPE, "png", training=True)
    source = store.source(PhotoReader(str(tmp_path), 10**6))
    for number in range(3):
        source.fetch(samples, number)
    assert decoded == [(tmp_path / "a.png").read_bytes()]


def test_reading_and_decoding_are_timed_apart(samples: pa.Table, tmp_path: Path) -> None:
    source = Source(PhotoReader(str(tmp_path), 10**6))
    times = FetchTimes()
    window = source.window(samples, 0, times)
    assert isinstance(window, Window)
    assert window.pixels.shape == (120, 160, 3)
    assert 0 < times.read_s < 1
    assert 0 < times.decode_s < 1


def test_windows_that_were_not_sent_come_from_store_or_photo(samples: pa.Table, tmp_path: Path) -> None:
    reader = PhotoReader(str(tmp_path), 10**6)
    store = SplitStore(ShardStore(str(tmp_path / "store")), RECIPE, "jpeg", training=True)
    made = store.source(reader)
    assert not made.has_all(samples, np.array([0, 1]))
    sent = made.fetch(samples, 0)
    cut = ShippedSource(reader, shipped={0: sent, 1: None}, store=store.source(reader))  # a store without it
    from_photo = [cut.window(samples, number, FetchTimes()) for number in (0, 1)]
    made.fetch(samples, 1)
    made.flush()
    nowhere = PhotoReader("/nowhere", 10**6)
    source = store.source(nowhere)
    assert source.has_all(samples, np.array([1, 0]))
    assert not source.has_all(samples, np.array([1, 2]))
    kept = ShippedSource(nowhere, shipped={0: None, 1: None}, store=source)
    for number, window in enumerate(from_photo):
        other = kept.window(samples, number, FetchTimes())
        assert isinstance(window, Window)
        assert isinstance(other, Window)
        np.testing.assert_array_equal(window.pixels, other.pixels)


def test_a_key_is_computed_once(samples: pa.Table) -> None:
    asked: list[str] = []

    class Counting(CropRecipe):
        def keys(self, samples: pa.Table) -> np.ndarray:
            asked.extend(samples["sample_id"].to_pylist())
            return super().keys(samples)

    keys, expected = KeyMemo(Counting(32, 0.1, CropJitter())), RECIPE.keys(samples)
    assert len(set(expected.tolist())) == 3
    for numbers in ([2, 0], [0], [2, 1, 0]):
        assert keys.of(samples, np.array(numbers)).tolist() == expected[numbers].tolist()
    assert asked == ["b#0", "a#0", "a#1"]


def test_remote_photos_are_read_several_at_a_time_and_once(
    samples: pa.Table, tmp_path: Path, s3_environment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(f"{s3_environment}/photos")
    storage.upload(tmp_path / "a.png", "a.png")
    remote, local = (PhotoReader(root, 10**6) for root in (storage.uri, str(tmp_path)))
    assert remote.is_remote and not local.is_remote
    reads: list[str] = []
    at_once = threading.Barrier(2, timeout=10)  # broken unless both photos are being read at the same time
    original = PhotoStore.read

    def read(store: PhotoStore, location: str) -> bytes:
        if store.root == storage.uri:
            reads.append(location)
            at_once.wait()
        return original(store, location)

    monkeypatch.setattr(PhotoStore, "read", read)
    windows = []
    for reader in (remote, local):
        source = Source(reader)
        source.prefetch(samples, range(3))
        windows.append([source.window(samples, number, FetchTimes()) for number in range(3)])
    assert sorted(reads) == ["a.png", "b.png"]
    assert all(isinstance(found[2], BadImage) and found[2].reason == "missing" for found in windows)
    for far, near in zip(windows[0][:2], windows[1][:2], strict=True):
        assert isinstance(far, Window) and isinstance(near, Window)
        assert np.array_equal(far.pixels, near.pixels)


def test_one_connection_per_process(tmp_path: Path, s3_environment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyarrow import fs

    made: list[int] = []
    original = fs.S3FileSystem
    monkeypatch.setattr("pyarrow.fs.S3FileSystem", lambda **options: made.append(1) or original(**options))
    reader = PhotoReader(f"{s3_environment}/photos", 10**6)
    for _ in range(20):
        assert isinstance(reader.read_bytes("none.png"), BadImage)
    assert len(made) == 1


def test_prefetching_skips_photos_whose_windows_are_stored(
    samples: pa.Table, tmp_path: Path, s3_environment: str
) -> None:
    storage = Storage(f"{s3_environment}/photos")
    storage.upload(tmp_path / "a.png", "a.png")
    store = SplitStore(ShardStore(str(tmp_path / "store")), RECIPE, "png", training=True)
    source = store.source(PhotoReader(storage.uri, 10**6))
    source.prefetch(samples, range(2))
    first = [source.window(samples, number, FetchTimes()) for number in range(2)]
    source.flush()
    storage.remove("a.png")
    again = store.source(PhotoReader(storage.uri, 10**6))
    again.prefetch(samples, range(2))
    for number, before in enumerate(first):
        window = again.window(samples, number, FetchTimes())
        assert isinstance(window, Window) and isinstance(before, Window)
        assert np.array_equal(window.pixels, before.pixels)
