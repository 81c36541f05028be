"""Shards: what was written comes back, damage is seen, and a shard is whole or absent."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import pytest

from pillsnap.data.store import shard_files
from pillsnap.data.store.shards import ShardStore
from pillsnap.data.windows import EncodedWindow
from pillsnap.errors import UserError


def windows(keys: range) -> list[tuple[int, EncodedWindow]]:
    return [(key, EncodedWindow(bytes([key % 256]) * (key % 7 + 1), key, 2.0 * key, 0.5, 0.25)) for key in keys]


@pytest.fixture(params=["local", "remote"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ShardStore:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "cache"))
    monkeypatch.setattr(shard_files, "_LIST_EVERY_S", 0.0)
    scheme = "file://" if request.param == "remote" else ""
    return ShardStore(f"{scheme}{tmp_path / 'store'}")


def file(store: ShardStore, name: str) -> Path:
    return Path(store.folder.removeprefix("file://"), name)


def test_windows_come_back_as_they_were(store: ShardStore) -> None:
    rows = [(2**64 - 1, EncodedWindow(b"last", 1.5, 2.5, 0.1, 0.2)), *windows(range(300))]
    store.append(rows[:100])
    store.append(rows[100:])
    store.refresh()
    for key, window in rows:
        found = store.get(key)
        assert found is not None
        assert (bytes(found.data), found.left, found.top, found.scale_x, found.scale_y) == (
            window.data, window.left, window.top, window.scale_x, window.scale_y,
        )  # fmt: skip
    assert store.get(300) is None
    assert store.stored(np.array([5, 300, 2**64 - 1], np.uint64)).tolist() == [True, False, True]
    assert store.shards() == {name: file(store, name).stat().st_size for name in os.listdir(file(store, ""))}


def test_the_same_windows_are_the_same_file(store: ShardStore) -> None:
    first, again = store.append(windows(range(5))), store.append(reversed(windows(range(5))))
    assert first == again
    assert list(store.shards()) == [first]


def test_later_shards_are_seen_after_a_look(store: ShardStore) -> None:
    store.refresh()  # not even a folder
    assert store.get(1) is None
    store.append(windows(range(3)))
    store.refresh()
    assert store.get(1) is not None
    store.append(windows(range(3, 6)))
    store.refresh()
    assert store.get(4) is not None


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_damage_is_found(store: ShardStore, damage: str) -> None:
    sound, name = store.append(windows(range(50))), store.append(windows(range(50, 99)))
    path = file(store, name)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes({"flip": bytes(data), "cut": bytes(data[: len(data) // 2]), "empty": b""}[damage])
    assert store.damaged() == [name]
    if damage != "flip" or store.folder.startswith("file://"):  # what is copied is checked on the way
        with pytest.raises(UserError, match=f"{name} of a store is damaged.*prepare --verify"):
            store.get(1)
    store.remove(name)
    assert list(store.shards()) == [sound]
    assert store.get(1) is not None
    assert store.get(60) is None


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    local = ShardStore(str(tmp_path / "full"))
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\).*data.store=off"):
        local.append(windows(range(5)))
    assert os.listdir(local.folder) == []


def test_a_shard_that_another_process_removed_is_forgotten_and_the_rest_stays(store: ShardStore) -> None:
    lost = store.append(windows(range(3)))
    store.append(windows(range(3, 6)))
    store.refresh()
    mapped = store.get(1)
    file(store, lost).unlink()
    store.refresh()
    assert store.stored(np.arange(6, dtype=np.uint64)).tolist() == [False] * 3 + [True] * 3
    assert mapped is not None and bytes(mapped.data) == windows([1])[0][1].data


def test_removing_takes_everything(store: ShardStore) -> None:
    store.append(windows(range(5)))
    store.refresh()
    store.remove()
    assert not file(store, "").exists()
    assert store.get(1) is None


def test_a_remote_shard_is_copied_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "cache"))
    store = ShardStore(f"file://{tmp_path / 'remote'}")
    name = store.append(windows(range(9)))
    assert store.get(3) is not None
    (copied,) = (tmp_path / "cache").rglob(name)
    (tmp_path / "remote" / name).rename(tmp_path / "gone")
    assert store.get(4) is not None
    assert copied.read_bytes() == (tmp_path / "gone").read_bytes()
