"""`pillsnap plan` measures the loader as training uses it, and leaves no file."""

from __future__ import annotations

from pathlib import Path

import pytest

from pillsnap.config import load_settings
from pillsnap.data.stream import Stream
from pillsnap.planner.loader_rates import measure_task_loader, read_run


@pytest.mark.parametrize("decode_in", ["workers", "tasks"])
def test_loader_with_a_store_is_measured_as_in_training(
    decode_in: str, ray_local: None, toy_manifest: Path, toy_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load_settings(
        "demo",
        {"classification.image_size_px": 32, "classification.batch_size": 8, "data.store": "jpeg",
         "data.decode_in": decode_in, "data.decoding_processes": 1, "train.cpus_per_worker": 0.25,
         "data.decoding_cpus": 0.5},
    )  # fmt: skip
    streams: list[Stream] = []
    dataset = Stream.dataset
    monkeypatch.setattr(Stream, "dataset", lambda self, *a, **k: streams.append(self) or dataset(self, *a, **k))
    before = sorted(toy_tree.rglob("*"))
    run = read_run(settings, str(tmp_path / "run"), toy_manifest, str(toy_tree))
    rates = measure_task_loader(run, "classification", 0.5, tmp_path / "store")
    assert rates.stored > 0 and rates.direct > 0  # which is faster says nothing on photos of a few kilobytes
    assert len(streams) == 2
    for stream in streams:
        assert (stream.ship_bytes, stream.decoders > 0) == (decode_in == "workers", decode_in == "tasks")
    assert not (tmp_path / "run").exists() and sorted(toy_tree.rglob("*")) == before
