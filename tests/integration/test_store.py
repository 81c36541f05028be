"""The decode-once store in the stream: same order and pixels, filled before or during training, with any decoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pillsnap.data.augment import CropJitter, FrameJitter
from pillsnap.data.decode_workers import decode_ahead
from pillsnap.data.fill_store import fill, split_stores
from pillsnap.data.plan import StreamPlan
from pillsnap.data.recipes import CropRecipe, FrameRecipe, Recipe
from pillsnap.data.samples import TaskSamples, classification_samples, detection_samples
from pillsnap.data.stream import Stream, batches_of, rows_of, share_samples
from pillsnap.manifest.table import read_manifest
from pillsnap.photos.reader import PhotoReader

CROPS = CropRecipe(64, 0.1, CropJitter(0.06, 0.12, 180))
FRAMES = FrameRecipe(96, FrameJitter(mosaic=1.0, scale=0.5, flip_horizontal=0.5), 4, 2, 4)


@pytest.fixture(scope="module")
def samples(toy_manifest: Path) -> TaskSamples:
    manifest = read_manifest(toy_manifest)
    return classification_samples(manifest, sorted({code for codes in manifest["codes"].to_pylist() for code in codes}))


def read(
    samples: TaskSamples, recipe: Recipe, reader: PhotoReader, folder: Path | None, codec: str = "png",
    ship: bool = False, epochs: int = 2, ship_stored: bool = True,
) -> list[dict[str, np.ndarray]]:  # fmt: skip
    plan = StreamPlan(3, epochs, len(samples.train), len(samples.val), 8, 1)
    stores = split_stores(str(folder), "task", recipe, codec, "0" * 64) if folder else {}  # type: ignore[arg-type]
    stream = Stream(
        plan, recipe, reader, share_samples(samples.train), share_samples(samples.val), 2, 0.5,
        stores.get("train"), stores.get("val"), ship, ship_stored,
    )  # fmt: skip
    dataset = stream.dataset()
    batches = decode_ahead(rows_of(dataset), stream.batch_maker(), 2) if ship else batches_of(dataset)
    return [{name: np.array(value) for name, value in batch.items() if name != "stage_s"} for batch in batches]


def assert_same(left: list, right: list, pixel_tolerance: int = 0) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            if name == "image":
                assert np.abs(one[name].astype(int) - other[name]).max() <= pixel_tolerance
            else:
                np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("codec", ["jpeg", "png"])
def test_store_changes_neither_order_nor_pixels(
    samples: TaskSamples, toy_tree: Path, tmp_path: Path, codec: str
) -> None:
    reader = PhotoReader(str(toy_tree), 10**7)
    passing = read(samples, CROPS, reader, tmp_path, codec)  # fills the store in its first epoch
    stores = split_stores(str(tmp_path), "task", CROPS, codec, "0" * 64)  # type: ignore[arg-type]
    for split, store in stores.items():
        filled = fill(store, getattr(samples, split), reader, 0.5)
        assert (filled.num_stored, filled.num_new, filled.bad) == (len(getattr(samples, split)), 0, [])
    assert_same(read(samples, CROPS, PhotoReader("/nowhere", 10**7), tmp_path, codec), passing)
    assert_same(read(samples, CROPS, reader, tmp_path, codec, ship=True), passing)
    nowhere = PhotoReader("/nowhere", 10**7)
    assert_same(read(samples, CROPS, nowhere, tmp_path, codec, ship=True, ship_stored=False), passing)
    lost = stores["train"].shards
    lost.remove(next(iter(lost.shards())))
    assert_same(read(samples, CROPS, reader, tmp_path, codec, ship=True, ship_stored=False), passing)
    if codec == "png":
        assert_same(read(samples, CROPS, reader, None), passing, pixel_tolerance=1)


@pytest.mark.usefixtures("ray_local")
def test_filling_resumes_and_lists_bad_photos(
    samples: TaskSamples, toy_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pillsnap.data.fill_store.SAMPLES_PER_SHARD", 4)
    reader, store = (
        PhotoReader(str(toy_tree), 10**7),
        split_stores(str(tmp_path), "task", CROPS, "jpeg", "0" * 64)["train"],
    )
    seen: list[tuple[int, int]] = []
    whole = fill(store, samples.train, reader, 0.5, lambda done, total: seen.append((done, total)))
    assert whole.num_new == whole.num_stored == len(samples.train)
    assert seen[-1] == (len(samples.train), len(samples.train))
    before = store.shards.shards()
    assert whole.num_bytes == sum(before.values()) > 0
    store.shards.remove(sorted(before)[1])
    again = fill(store, samples.train, reader, 0.5)
    assert 0 < again.num_new <= 4
    assert store.shards.shards() == before

    broken = samples.train.set_column(
        samples.train.column_names.index("sample_id"), "sample_id",
        [[f"new {i}" for i in range(len(samples.train))]],
    )  # fmt: skip
    nothing = fill(store, broken, PhotoReader(str(tmp_path), 10**7), 0.5)
    assert nothing.num_stored == 0
    assert [sample_id for sample_id, _ in sorted(nothing.bad)] == sorted(f"new {i}" for i in range(len(broken)))
    assert all(reason.startswith("missing") for _, reason in nothing.bad)


@pytest.mark.usefixtures("ray_local")
def test_frames_are_the_same_from_photos_and_store(toy_manifest: Path, toy_tree: Path, tmp_path: Path) -> None:
    samples, reader = detection_samples(read_manifest(toy_manifest)), PhotoReader(str(toy_tree), 10**7)
    passing = read(samples, FRAMES, reader, tmp_path, "jpeg")
    assert_same(read(samples, FRAMES, PhotoReader("/nowhere", 10**7), tmp_path, "jpeg"), passing)
    assert_same(read(samples, FRAMES, PhotoReader("/nowhere", 10**7), tmp_path, "jpeg", ship=True), passing)
