"""The decode-once stores of a run's tasks, and the disk space for them."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa

from pillsnap.checklist import Check
from pillsnap.config import Settings
from pillsnap.data.fill_store import KEPT_FREE_BYTES, Room, room_for, split_stores
from pillsnap.data.sources import SplitStore
from pillsnap.manifest.table import manifest_hash, read_classes, read_manifest
from pillsnap.photos.reader import PhotoReader
from pillsnap.runs.directory import FOUND_BOXES_FILE
from pillsnap.tasks.registry import make_task


def run_stores(
    settings: Settings, run_dir: Path, manifest_path: Path, folder: str, *, read_only: bool = False
) -> list[tuple[str, SplitStore, pa.Table]]:
    """(name, store, samples) for every split of every task to train. data.store must not be off.

    Pills that the detector still has to box are missing; training adds them. `read_only`: nothing is written.
    """
    assert settings.data.store != "off"
    manifest = read_manifest(manifest_path)
    codes = [entry.code for entry in read_classes(manifest_path if manifest_path.is_dir() else manifest_path.parent)]
    found_path = run_dir / FOUND_BOXES_FILE
    found_boxes = json.loads(found_path.read_text(encoding="utf-8")) if found_path.exists() else None
    stores = []
    for name in settings.tasks:
        task = make_task(name, settings, codes)
        samples = task.samples(manifest, found_boxes)
        made = split_stores(
            folder, name, task.recipe(samples), settings.data.store, manifest_hash(manifest_path), read_only=read_only
        )
        stores += [(f"{name} {split}", store, getattr(samples, split)) for split, store in made.items()]
    return stores


def store_check(settings: Settings, run_dir: Path, manifest_path: Path, folder: str, data_root: str) -> Check:
    """Is there room for the stores in `folder`? Training keeps no windows where there is not."""
    stores = run_stores(settings, run_dir, manifest_path, folder, read_only=True)
    reader = PhotoReader(data_root, settings.data.max_pixels)
    room = room_for([(store, samples) for _, store, samples in stores], folder, reader)
    if room.is_enough:
        return Check("store", True, str(room))
    return Check("store", None, too_small(room), "training makes its windows anew in each epoch")


def too_small(room: Room) -> str:
    """What to do about a disk without room for a store."""
    return (
        f"The store needs {room}, of which {KEPT_FREE_BYTES / 1e9:.0f} GB must stay free: free space, or name another "
        "folder with data.store_dir."
    )
