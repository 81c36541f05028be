"""The two measurements of a loader, with Ray's parts replaced: from photos with an empty store, and from a full one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pillsnap.config import load_settings
from pillsnap.data import fill_store
from pillsnap.data.sources import SplitStore
from pillsnap.photos.reader import PhotoReader
from pillsnap.planner import loader_rates
from pillsnap.planner.loader_rates import measure_task_loader, read_run
from pillsnap.train import trainer


def fill_here(store: SplitStore, samples: pa.Table, reader: PhotoReader, *_: Any) -> None:
    source = store.source(reader)
    source.prefetch(samples, range(len(samples)))
    for number in range(len(samples)):
        source.fetch(samples, number)
    source.flush()


@pytest.mark.parametrize("store", ["jpeg", "off"])
@pytest.mark.parametrize("name", ["detection", "classification"])
def test_photos_are_measured_first_and_then_the_store(
    name: str, store: str, toy_manifest: Path, toy_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"detection.samples_per_epoch": 4, "detection.combination_share": 0.5, "detection.validation_samples": 2}
    settings = load_settings("demo", {"data.store": store, **sizes})
    monkeypatch.setattr(trainer, "share_samples", lambda samples: samples)
    monkeypatch.setattr(trainer, "_decodes_in_workers", lambda settings: False)
    monkeypatch.setattr(trainer, "_all_workers_read", lambda folder: True)
    monkeypatch.setattr(fill_store, "fill", fill_here)
    stored: list[float] = []
    plans: list[tuple[int, int]] = []

    def measure(stream: Any, *_: Any) -> float:
        plans.append((stream.plan.num_train, stream.plan.train_steps))
        shards = stream.train_store
        if shards is not None:
            assert shards.read_only
            keys = shards.cutter.keys(stream.train_samples)
            stored.append(float(np.mean(shards.shards.stored(keys))))
        return 100.0 * len(plans)

    monkeypatch.setattr(loader_rates, "measure_loader", measure)
    before = sorted(toy_tree.rglob("*"))
    run = read_run(settings, str(tmp_path / "run"), toy_manifest, str(toy_tree))
    rates = measure_task_loader(run, name, 0.1, tmp_path / "store")
    batch_size = getattr(settings, name).batch_size
    assert all(num >= 64 * batch_size and steps == -(-num // batch_size) for num, steps in plans)
    assert not (tmp_path / "run").exists() and sorted(toy_tree.rglob("*")) == before
    assert (stored, rates.direct, rates.stored) == (([0, 1], 100, 200) if store == "jpeg" else ([], 100, 100))
