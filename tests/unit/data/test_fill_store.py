"""Disk space for a store: known before it is filled, and no condition for training."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from pillsnap.config import load_settings
from pillsnap.data.augment import CropJitter
from pillsnap.data.batch_maker import BatchMaker
from pillsnap.data.fill_store import KEPT_FREE_BYTES, room_for, split_stores
from pillsnap.data.plan import StreamPlan
from pillsnap.data.recipes import CropRecipe
from pillsnap.data.samples import TaskSamples, classification_samples
from pillsnap.data.sources import SplitStore
from pillsnap.data.stream import Stream
from pillsnap.manifest.table import read_manifest
from pillsnap.photos.reader import PhotoReader
from pillsnap.tasks.stores import store_check
from pillsnap.train.trainer import within_room

RECIPE = CropRecipe(64, 0.1, CropJitter(0.06, 0.12, 180))


@pytest.fixture
def samples(toy_manifest: Path) -> TaskSamples:
    manifest = read_manifest(toy_manifest)
    return classification_samples(manifest, sorted({code for codes in manifest["codes"].to_pylist() for code in codes}))


def free_disk(monkeypatch: pytest.MonkeyPatch, free_bytes: int) -> None:
    usage = namedtuple("usage", "total used free")(10**12, 0, free_bytes)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)


def fill_all(store: SplitStore, samples: TaskSamples, reader: PhotoReader) -> int:
    """Bytes of all windows of the training split."""
    source = store.source(reader)
    for number in range(len(samples.train)):
        source.fetch(samples.train, number)
    source.flush()
    return sum(store.shards.shards().values())


def test_size_of_a_store_is_known_before_it_is_filled(samples: TaskSamples, toy_tree: Path, tmp_path: Path) -> None:
    reader, folder = PhotoReader(str(toy_tree), 10**7), str(tmp_path / "store")
    store = split_stores(folder, "t", RECIPE, "jpeg", "0" * 64)["train"]
    room = room_for([(store, samples.train)], folder, reader)
    assert store.shards.shards() == {}  # nothing is written
    needed = fill_all(store, samples, reader)
    assert room.needed_bytes == pytest.approx(needed, rel=0.25)
    assert room.is_enough and room.free_bytes == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)
    assert room_for([(store, samples.train)], folder, reader).needed_bytes == 0
    assert room_for([(store, samples.train.slice(0, 0))], folder, reader).needed_bytes == 0


def test_small_disk_keeps_nothing_and_changes_no_sample(
    samples: TaskSamples, toy_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, folder = PhotoReader(str(toy_tree), 10**7), str(tmp_path / "store")
    plan = StreamPlan(0, 2, len(samples.train), len(samples.val), 8, 1)
    seen: list[list[np.ndarray]] = []
    for free_bytes, says in ((KEPT_FREE_BYTES + 10**9, False), (KEPT_FREE_BYTES + 10, True)):
        free_disk(monkeypatch, free_bytes)
        stores = split_stores(folder, "t", RECIPE, "jpeg", "0" * 64)
        stream = Stream(
            plan, RECIPE, reader, None, None, 2, 0.5, stores["train"], stores["val"]  # type: ignore[arg-type]
        )  # fmt: skip
        stream, message = within_room(stream, samples, folder)
        assert bool(message) == says
        assert stream.train_store is not None and stream.val_store is not None
        assert stream.train_store.read_only == stream.val_store.read_only == says
        tables = {True: samples.train, False: samples.val}
        maker = BatchMaker(plan, RECIPE, reader, tables, {True: stream.train_store, False: stream.val_store})
        images = []
        for number in range(3):
            source = maker.source(training=True)
            images.append(maker.make(plan.slot(number), source)["image"])
            source.flush()  # type: ignore[attr-defined]
        assert (stream.train_store.shards.shards() == {}) == says
        stream.train_store.shards.remove()
        seen.append(images)
    np.testing.assert_array_equal(seen[0], seen[1])
    assert message.startswith("The store needs about 0.0 GB of 2.0 GB free in ") and "data.store_dir" in message


def test_preflight_names_room_and_lack(
    toy_manifest: Path, toy_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load_settings("demo", {"data.store": "jpeg", "detection.image_size_px": 64})
    for free_bytes, ok in ((10**11, True), (KEPT_FREE_BYTES, None)):
        free_disk(monkeypatch, free_bytes)
        check = store_check(settings, tmp_path, toy_manifest, str(tmp_path / "store"), str(toy_tree))
        assert check.ok is ok, check
        assert f"{free_bytes / 1e9:.1f} GB free in {tmp_path / 'store'}" in check.found
    assert not (tmp_path / "store").exists()


def test_stages_keep_a_store() -> None:
    assert {load_settings(f"stage{number}").data.store for number in (1, 2, 3, 4)} == {"jpeg2x"}
    assert load_settings("demo").data.store == "off"
