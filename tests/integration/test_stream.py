"""The stream through Ray Data: every sample once an epoch, in the same order for any number of workers."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray

from pillsnap.data.augment import CropJitter
from pillsnap.data.fill_store import split_stores
from pillsnap.data.plan import Slot, StreamPlan
from pillsnap.data.recipes import Batch, CropRecipe
from pillsnap.data.samples import classification_samples
from pillsnap.data.sources import Source
from pillsnap.data.stream import Stream, batches_of, rows_of, share_samples
from pillsnap.manifest.table import read_manifest
from pillsnap.photos.reader import PhotoReader
from pillsnap.ray_compat import capabilities

Step = tuple[int, bool, int]


@ray.remote(num_cpus=0)
class Consumer:
    """Reads one worker's share, slowly if asked."""

    def read(self, shard: ray.data.DataIterator, pause_s: float) -> list[tuple[Step, list[int], int]]:
        rows = []
        for batch in batches_of(shard):
            step = (int(batch["epoch"]), bool(batch["training"]), int(batch["step"]))
            members = [int(i) for i in batch["index"] if i >= 0]
            rows.append((step, members, int(batch["image"][batch["valid"]].sum(dtype=np.int64))))
            time.sleep(pause_s)
        return rows


@pytest.fixture(scope="module")
def samples(toy_manifest: Path) -> tuple[pa.Table, pa.Table]:
    manifest = read_manifest(toy_manifest)
    codes = sorted({code for codes in manifest["codes"].to_pylist() for code in codes})
    tables = classification_samples(manifest, codes)
    return tables.train, tables.val


BATCHES_PER_READ = 4
RECIPE = CropRecipe(32, 0.1, CropJitter(0.1, 0.1, 180, 0.1, 0.1, 0.1))


@dataclass(frozen=True)
class DyingRecipe(CropRecipe):
    """Ends its process the first time it makes a certain batch, as a machine's out-of-memory killer would."""

    marker: str = ""

    def make(
        self, samples: pa.Table, slot: Slot, seed: int, capacity: int, source: Source, images: Any = None
    ) -> Batch:
        if (slot.epoch, slot.step) == (1, 1) and not os.path.exists(self.marker):
            Path(self.marker).touch()
            os._exit(1)
        return super().make(samples, slot, seed, capacity, source, images)


@dataclass(frozen=True)
class HeldRecipe(CropRecipe):
    """Makes its first batch, and others when there is a file."""

    gate: str = ""

    def make(
        self, samples: pa.Table, slot: Slot, seed: int, capacity: int, source: Source, images: Any = None
    ) -> Batch:
        asked_s = time.monotonic()
        while slot.step and not os.path.exists(self.gate):
            if time.monotonic() - asked_s > 30:
                raise TimeoutError("nobody had the first batch")
            time.sleep(0.02)
        return super().make(samples, slot, seed, capacity, source, images)


def make_stream(
    samples: tuple[pa.Table, pa.Table], data_root: Path, plan: StreamPlan, recipe: CropRecipe = RECIPE, **options: Any
) -> Stream:
    reader = PhotoReader(str(data_root), 10**7)
    train, val = (share_samples(table) for table in samples)
    return Stream(plan, recipe, reader, train, val, BATCHES_PER_READ, 0.5, **options)


def read_stream(
    samples: tuple[pa.Table, pa.Table], data_root: Path, workers: int, first_slot: int = 0, epochs: int = 3,
    recipe: CropRecipe = RECIPE, store: Path | None = None, decoders: int = 0,
) -> list:  # fmt: skip
    plan = StreamPlan(11, epochs, len(samples[0]), len(samples[1]), 8, workers)
    stores = split_stores(str(store), "task", recipe, "png", "0" * 64) if store else {}
    of_split = {"train_store": stores.get("train"), "val_store": stores.get("val")}
    stream = make_stream(samples, data_root, plan, recipe, decoders=decoders, **of_split)
    shards = stream.dataset(first_slot).streaming_split(workers, equal=True)
    consumers = [Consumer.remote() for _ in shards]
    reads = [
        c.read.remote(shard, 0.05 * (rank == 1)) for rank, (c, shard) in enumerate(zip(consumers, shards, strict=True))
    ]
    shares = ray.get(reads)
    steps = []
    for rows in zip(*shares, strict=True):
        assert len({step for step, _, _ in rows}) == 1, "the workers are at different steps"
        steps.append((rows[0][0], [i for _, members, _ in rows for i in members], sum(total for *_, total in rows)))
    return steps


@pytest.mark.usefixtures("ray_local")
def test_order_is_the_same_for_one_two_and_four_workers(samples: tuple[pa.Table, pa.Table], toy_tree: Path) -> None:
    one = read_stream(samples, toy_tree, 1)
    for epoch in range(3):
        trained = [i for (e, training, _), members, _ in one if e == epoch and training for i in members]
        validated = [i for (e, training, _), members, _ in one if e == epoch and not training for i in members]
        assert sorted(trained) == list(range(len(samples[0])))
        assert validated == list(range(len(samples[1])))
    assert read_stream(samples, toy_tree, 2) == one
    assert read_stream(samples, toy_tree, 4) == one
    assert read_stream(samples, toy_tree, 2, decoders=2) == one


@pytest.mark.usefixtures("ray_local")
def test_order_from_the_store_is_that_from_the_photos(
    samples: tuple[pa.Table, pa.Table], toy_tree: Path, tmp_path: Path
) -> None:
    photos = read_stream(samples, toy_tree, 1, epochs=2)
    one = read_stream(samples, toy_tree, 1, epochs=2, store=tmp_path)
    assert [(step, members) for step, members, _ in one] == [(step, members) for step, members, _ in photos]
    np.testing.assert_allclose([total for *_, total in one], [total for *_, total in photos], rtol=1e-5)
    assert read_stream(samples, toy_tree, 2, epochs=2, store=tmp_path) == one
    assert read_stream(samples, toy_tree, 4, epochs=2, store=tmp_path) == one


@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("decoders", [0, 2])
def test_what_a_process_was_making_when_it_died_is_made_again_in_its_place(
    samples: tuple[pa.Table, pa.Table], toy_tree: Path, tmp_path: Path, decoders: int
) -> None:
    marker = tmp_path / "died"
    recipe = DyingRecipe(RECIPE.size_px, RECIPE.margin, RECIPE.jitter, marker=str(marker))
    rows = read_stream(samples, toy_tree, 2, epochs=2, recipe=recipe, decoders=decoders)
    assert marker.exists()
    assert rows == read_stream(samples, toy_tree, 2, epochs=2)


@pytest.mark.usefixtures("ray_local")
def test_the_first_batch_waits_for_no_other(samples: tuple[pa.Table, pa.Table], toy_tree: Path, tmp_path: Path) -> None:
    plan = StreamPlan(11, 1, len(samples[0]), 0, 8, 1)
    recipe = HeldRecipe(RECIPE.size_px, RECIPE.margin, RECIPE.jitter, gate=str(tmp_path / "gate"))
    batches = batches_of(make_stream(samples, toy_tree, plan, recipe, decoders=1).dataset())
    assert next(batches)["step"] == 0
    (tmp_path / "gate").touch()
    assert [int(batch["step"]) for batch in batches] == list(range(1, plan.num_slots))


@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("decoders", [0, 2])
def test_a_stream_starts_no_actor_that_serves_several_nodes(
    samples: tuple[pa.Table, pa.Table], toy_tree: Path, decoders: int
) -> None:
    started = _named_actors()
    read_stream(samples, toy_tree, 2, epochs=1, decoders=decoders)
    left_out = {
        "datasets_stats_actor": capabilities.no_stats_actor(),
        "ActorLocationTracker": capabilities.no_location_actor(),
    }
    assert _named_actors() - started <= {"AutoscalingCoordinator", *(name for name, out in left_out.items() if not out)}
    assert not _named_actors() & {name for name, out in left_out.items() if out}, "another test's stream started it"


def _named_actors() -> set[str]:
    return {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}


@pytest.mark.usefixtures("ray_local")
def test_after_the_first_batches_several_of_one_worker_are_handed_over_together(
    samples: tuple[pa.Table, pa.Table], toy_tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def batches_per_row(workers: int, decoders: int) -> list[int]:
        plan = StreamPlan(11, 3, len(samples[0]), len(samples[1]), 8, workers)
        rows = rows_of(make_stream(samples, toy_tree, plan, decoders=decoders).dataset())
        found = [row["image"].shape[:2] for row in rows]
        assert {length for length, _ in found} == {1}  # a block holds one row
        assert sum(number for _, number in found) == plan.num_slots
        return [number for _, number in found]

    one = batches_per_row(workers=1, decoders=2)
    assert one[:4] == [1] * 4 and set(one[4:-1]) == {4} and len(one) > 6
    two = batches_per_row(workers=2, decoders=1)
    assert two[:4] == [1] * 4 and set(two[4:-2]) == {2} and two[-1] == two[-2]
    assert set(batches_per_row(workers=8, decoders=0)) == {1}
    monkeypatch.setattr("pillsnap.data.stream._ROW_BYTES", 3 * 8 * 32 * 32 * 3)
    assert max(batches_per_row(workers=1, decoders=2)) == 3


@pytest.mark.usefixtures("ray_local")
def test_a_stream_taken_up_in_the_middle_is_the_rest_of_it(samples: tuple[pa.Table, pa.Table], toy_tree: Path) -> None:
    plan = StreamPlan(11, 2, len(samples[0]), len(samples[1]), 8, 2)
    whole = read_stream(samples, toy_tree, 2, epochs=2)
    rest = read_stream(samples, toy_tree, 2, plan.first_slot(1, 1), epochs=2)
    assert rest == whole[-len(rest) :]
    assert rest[0][0] == (1, True, 1)


@pytest.mark.usefixtures("ray_local")
def test_a_stream_needs_no_whole_cpu(samples: tuple[pa.Table, pa.Table], toy_tree: Path) -> None:
    """Where train workers have left half a CPU, that is enough: nothing of the stream asks for Ray's default of one."""
    taken = [Consumer.options(num_cpus=0.75).remote() for _ in range(2)]
    try:
        ray.get([actor.__ray_ready__.remote() for actor in taken])
        rows = read_stream(samples, toy_tree, 1, epochs=1)
        assert sorted(i for (_, training, _), members, _ in rows if training for i in members) == list(
            range(len(samples[0]))
        )
    finally:
        for actor in taken:
            ray.kill(actor)


@pytest.mark.usefixtures("ray_local")
def test_order_is_the_same_by_the_public_api_of_ray(
    samples: tuple[pa.Table, pa.Table], toy_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last test of this file: it starts actors that another test expects not to run."""

    def epoch(workers: int, **options: Any) -> list[tuple[Step, list[int], int]]:
        return read_stream(samples, toy_tree, workers, epochs=1, **options)

    one, stored = epoch(1), epoch(1, store=tmp_path / "store")
    monkeypatch.setenv(capabilities.VARIABLE, "public")
    capabilities.forget()
    try:
        assert all(epoch(workers) == one for workers in (1, 2, 4))
        assert epoch(2, decoders=2) == one
        assert epoch(2, store=tmp_path / "public") == stored
    finally:
        monkeypatch.undo()
        capabilities.forget()
