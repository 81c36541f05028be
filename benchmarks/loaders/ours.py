"""The limit of the machine, the mock loader, and PillSnap's loaders."""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import time
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import ray

from benchmarks.loaders.data import (
    BATCH,
    CORES,
    FRAME_BATCH,
    RECIPE,
    STORE_REPEATS,
    Prepared,
    decode_crop,
)
from benchmarks.loaders.measure import Batches, measure
from pillsnap.config import DataSettings
from pillsnap.data import augment
from pillsnap.data.decode_workers import decode_ahead
from pillsnap.data.loader import Loader
from pillsnap.data.malloc import keep_freed_memory
from pillsnap.data.plan import StreamPlan
from pillsnap.data.sources import SplitStore
from pillsnap.data.stream import Stream, batches_of, rows_of, share_samples, warm_up_reading
from pillsnap.data.windows import Photo

_DATA = DataSettings()
_EPOCHS = 10_000


def limit(data: Prepared, seconds: float, *, stored: bool) -> dict[str, float]:
    """Images per second of one process per core that reads, decodes and warps, without handing over; and the unix times
    between which all were running.
    """
    with multiprocessing.get_context("spawn").Pool(CORES) as pool:
        arguments = [(str(data.folder), part, seconds, stored) for part in range(CORES)]
        rates, begun_s, ended_s = zip(*pool.starmap(_limit_process, arguments), strict=True)
    return {"images_per_s": sum(rates), "steady_from_s": max(begun_s), "steady_to_s": min(ended_s)}


def _limit_process(folder: str, part: int, seconds: float, stored: bool) -> tuple[float, float, float]:
    cv2.setNumThreads(1)
    keep_freed_memory()
    data = Prepared(Path(folder))
    samples, boxes, jpegs = data.crop_samples(), data.boxes(), data.jpegs()
    started = warm_s = time.perf_counter()
    for done, number in enumerate(itertools.cycle(range(part, len(jpegs), CORES))):
        rng = augment.sample_rng(0, 0, str(number))
        if stored:
            decode_crop(jpegs[number].read_bytes(), boxes[number], rng)
        else:
            box = np.array(samples["box"][number].as_py())
            photo = Photo((data.photos / samples["location"][number].as_py()).read_bytes(), 64_000_000)
            window = photo.window(RECIPE.needed(samples, number, training=True))
            augment.crop(window.pixels, window.map_boxes(box), RECIPE.size_px, RECIPE.margin, RECIPE.jitter, rng)
        if done == 40:  # after the imports and the first pages
            warm_s = time.perf_counter()
        if done > 40 and time.perf_counter() - started > seconds:
            took_s, now_s = time.perf_counter() - warm_s, time.time()
            return (done - 40) / took_s, now_s - took_s, now_s
    raise AssertionError


def mock(data: Prepared) -> Batches:
    """The same batch repeatedly: the maximum rate of a loop."""
    batch = np.zeros((BATCH, RECIPE.size_px, RECIPE.size_px, 3), np.uint8)
    for epoch in itertools.count():
        for _ in range(100):
            yield epoch, batch


def direct(data: Prepared) -> Stream:
    return _crop_stream(data, None, ship=False)


def store_tasks(data: Prepared) -> Stream:
    return _crop_stream(data, data.store(), ship=False)


def store_workers(data: Prepared) -> Stream:
    return _crop_stream(data, data.store(), ship=True)


def detection(data: Prepared) -> Stream:
    samples = data.frame_samples()
    plan = StreamPlan(0, _EPOCHS, len(samples), 0, FRAME_BATCH, 1)
    recipe = dataclasses.replace(data.frame_recipe(), mosaic_epochs=_EPOCHS)
    shared = share_samples(samples)
    reads, cpus = _DATA.batches_per_read, _DATA.decoding_cpus
    return Stream(plan, recipe, data.reader(), shared, shared, reads, cpus, decoders=CORES)


def _crop_stream(data: Prepared, store: SplitStore | None, *, ship: bool) -> Stream:
    samples = pa.concat_tables([data.crop_samples()] * (STORE_REPEATS if store else data.photo_repeats()))
    if ship:
        warm_up_reading()
    plan = StreamPlan(0, _EPOCHS, len(samples), 0, BATCH, 1)
    shared = share_samples(samples)
    reads = 8 if store else _DATA.batches_per_read
    return Stream(
        plan, RECIPE, data.reader(), shared, shared, reads, _DATA.decoding_cpus, store,
        ship_bytes=ship, ship_stored=False, decoders=0 if ship else CORES,
    )  # fmt: skip


def measure_stream(stream: Stream, seconds: float, gap: bool) -> dict[str, float]:
    """Read a stream as a train worker does: through a split, in its own process. Ray must be initialised."""
    worker = _Worker.remote()  # type: ignore[attr-defined]
    ray.get(worker.import_torch.remote())  # takes seconds in a train worker with any loader
    started_s = time.time()
    (shard,) = stream.dataset().streaming_split(1, equal=True)
    return ray.get(worker.measure.remote(shard, stream, started_s, seconds, gap))


@ray.remote(num_cpus=0.25)
class _Worker:
    def import_torch(self) -> None:
        import torch

        torch.set_num_threads(1)
        keep_freed_memory()

    def measure(
        self, shard: ray.data.DataIterator, stream: Stream, started_s: float, seconds: float, gap: bool
    ) -> dict[str, float]:
        import torch

        made = decode_ahead(rows_of(shard), stream.batch_maker(), CORES) if stream.ship_bytes else batches_of(shard)
        # The last batch of an epoch is not full.
        batches = ((batch.epoch, batch.images[: batch.num_valid]) for batch in Loader(made, torch.device("cpu")))
        return measure(batches, started_s, seconds, gap)
