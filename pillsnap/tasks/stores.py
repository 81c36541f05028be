"""Lists the decode-once stores of a run's tasks."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa

from pillsnap.config import Settings
from pillsnap.data.fill_store import has_jpeg, split_stores
from pillsnap.data.sources import SplitStore
from pillsnap.manifest.table import manifest_hash, read_classes, read_manifest
from pillsnap.runs.directory import FOUND_BOXES_FILE
from pillsnap.tasks.registry import make_task


def run_stores(
    settings: Settings, run_dir: Path, manifest_path: Path, folder: str
) -> list[tuple[str, SplitStore, pa.Table]]:
    """(name, store, samples) for every split of every task to train. data.store must not be off.

    Pills that the detector still has to box are missing; training adds them.
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
            folder, name, task.recipe(samples), settings.data.store, manifest_hash(manifest_path),
            reduced=has_jpeg(samples),
        )  # fmt: skip
        stores += [(f"{name} {split}", store, getattr(samples, split)) for split, store in made.items()]
    return stores
