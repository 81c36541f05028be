"""What 2.63 million photos, 64 GPUs and 100 nodes require of a cluster, and which part limits first.

    python -m benchmarks.scaling_model [--measure] [--gpus N] [--nodes N] [--photos N] [--json FILE]

A simulation of the stream: tasks make rows on cores, one scheduling loop hands them out, and all workers synchronise at
every step. Its costs are those of benchmarks/log/; tests/unit/test_scaling_model.py compares it with the throughputs
measured there. `--measure` takes the scheduling loop's cost from this machine instead (benchmarks/scaling_costs.py).
docs/scaling.md has the conclusions.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Costs:
    """Measured on 2 cores of an AMD EPYC; sources are the tables of benchmarks/log/ unless stated."""

    photo_bytes: float = 1.26e6
    crop_from_photo_s: float = 2 / 334
    """Core seconds to read, decode and warp one crop: the limit of "crops of 224 px from the PNG photos"."""
    crop_from_store_s: float = 2 / 3663
    """The same from stored JPEG crops."""
    frame_from_photo_s: float = 2 / 166
    """One photo of a 640 px mosaic, transfer included, since there is no bare loop of ultralytics' augmentation."""
    stored_crop_bytes: float = 26.9e3
    put_s_per_byte: float = 5.8e-3 / 9.6e6
    """Seconds per byte to put a batch into the object store."""
    row_s: float = 4.7e-3
    """Scheduling loop, per row: 0.1 to 0.25 of a core at 37 rows per second."""
    listing_cores: float = 0.05
    manifest_row_bytes: float = 286
    crop_row_bytes: float = 218
    """Memory per crop in the sample table of every node."""
    frame_row_bytes: float = 152
    order_row_bytes: float = 2 * 8
    """A process keeps the orders of two epochs."""


@dataclass(frozen=True)
class Work:
    """Training of one task: cost of its images and the rate of their consumption."""

    name: str
    images_per_row: int
    """Batch size of a worker."""
    image_s: float
    """Core seconds to produce one image, without transfer."""
    image_bytes: float
    """Size of one image in the object store."""
    read_bytes: float
    """Bytes read per image."""
    gpu_images_per_s: float
    rows_per_task: int = 2
    steps_per_row: int = 1
    """Steps of a worker per row: more than 1 where rows contain the bytes of windows."""


@dataclass(frozen=True)
class Cluster:
    """Resources of the simulated cluster."""

    workers: int
    cores: float
    """Cores for decoding."""
    shared: bool = False
    """Whether scheduling and consumers share these cores, as on one small machine."""


@dataclass(frozen=True)
class Outcome:
    """Result of a simulation."""

    images_per_s: float
    coordinator_busy: float
    """Share of its one core; 1 is saturated."""
    cores_busy: float
    wait_fraction: float
    """Share of the time that workers wait for data."""


STEPS_SIMULATED, STEPS_AHEAD = 200, 4


def simulate(work: Work, cluster: Cluster, costs: Costs) -> Outcome:
    """Throughput of the stream in steady state."""
    outcome, cores = _simulate(work, cluster.workers, cluster.cores, costs), cluster.cores
    for _ in range(20 if cluster.shared else 0):
        left = cluster.cores - outcome.coordinator_busy - costs.listing_cores
        cores = (cores + left) / 2
        outcome = _simulate(work, cluster.workers, cores, costs)
    return outcome


def _simulate(work: Work, workers: int, cores: float, costs: Costs) -> Outcome:
    """Recurrence over rows: a core produces each, the loop schedules it, a step starts with its last row."""
    images = work.images_per_row * work.steps_per_row
    whole = max(1, int(cores))
    slower = whole / cores  # a fraction of a core slows down all cores
    make_s = images * (work.image_s + work.image_bytes * costs.put_s_per_byte) * slower
    step_s = images / work.gpu_images_per_s if work.gpu_images_per_s else 0.0
    free = np.zeros(whole)
    ends = np.zeros(STEPS_SIMULATED + 1)
    handed, waited, row, core = 0.0, 0.0, 0, 0
    for step in range(STEPS_SIMULATED):
        ready, allowed = 0.0, ends[max(0, step - STEPS_AHEAD)]
        for _ in range(workers):
            if row % work.rows_per_task == 0:
                core = int(free.argmin())
                free[core] = max(free[core], allowed)
            free[core] += make_s
            handed = max(handed, free[core]) + costs.row_s
            ready = max(ready, handed)
            row += 1
        begin = max(ends[step], ready)
        waited += begin - ends[step]
        ends[step + 1] = begin + step_s
    half = STEPS_SIMULATED // 2
    rate = half * workers / float(ends[-1] - ends[half])
    return Outcome(rate * images, rate * costs.row_s, rate * make_s / slower, waited / float(ends[-1]))


def works(costs: Costs, batch: int = 32, frames: int = 16) -> dict[str, Work]:
    """Stage 3 tasks, with the expected rates of an RTX 5080 (EfficientNetV2-S at 224 px, yolo11m at 640 px)."""
    crop, frame, crops_per_s, frames_per_s = 224 * 224 * 3, 640 * 640 * 3, 1150, 120
    photos = Work("classification, photos", batch, costs.crop_from_photo_s, crop, costs.photo_bytes, crops_per_s)
    stored = Work(
        "classification, store", batch, costs.crop_from_store_s, crop, costs.stored_crop_bytes, crops_per_s, 8
    )
    frame_s = costs.frame_from_photo_s - frame * costs.put_s_per_byte
    detection = Work("detection, photos", frames, frame_s, frame, costs.photo_bytes, frames_per_s)
    return {work.name: work for work in (detection, photos, stored)}


@dataclass(frozen=True)
class Demand:
    """Requirements of a training whose GPUs never wait."""

    images_per_s: float
    rows_per_s: float
    cores: float
    read_bytes_per_s: float
    requests_per_s: float
    store_bytes_per_s: float
    """Through the object stores, and over the network without locality."""
    coordinator_cores: float


def demand(work: Work, gpus: int, costs: Costs) -> Demand:
    """Requirements by arithmetic; `simulate` gives the achieved rate."""
    images = gpus * work.gpu_images_per_s
    rows = images / work.images_per_row / work.steps_per_row
    core_s = work.image_s + work.image_bytes * costs.put_s_per_byte
    return Demand(images, rows, images * core_s, images * work.read_bytes, images, images * work.image_bytes,
                  rows * costs.row_s)  # fmt: skip


def head_memory_bytes(photos: int, costs: Costs) -> dict[str, float]:
    """Memory that grows with the number of photos, by location."""
    crops = 1.024 * photos  # stage 3 has 2.4 % more crops to train on than photos
    return {
        "driver: the manifest": photos * costs.manifest_row_bytes,
        "every node: samples of classification": crops * costs.crop_row_bytes,
        "every node: samples of detection": photos * costs.frame_row_bytes,
        "every decoding process: two orders": crops * costs.order_row_bytes,
    }


def gpus_until(work: Work, costs: Costs, most: int = 512) -> int:
    """Maximum number of GPUs that one scheduling loop can serve."""
    per_gpu = work.gpu_images_per_s / work.images_per_row / work.steps_per_row * costs.row_s
    return min(most, int(1 / per_gpu))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="measure the costs that are measured without photos")
    parser.add_argument("--quick", action="store_true", help="with --measure: seconds")
    parser.add_argument("--gpus", type=int, default=64)
    parser.add_argument("--nodes", type=int, default=100)
    parser.add_argument("--photos", type=int, default=2_630_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    costs = Costs()
    if options.measure:
        from benchmarks.scaling_costs import measure_row_s

        figures = measure_row_s(5.0 if options.quick else 30.0)
        print(f"scheduling loop: {figures['row_s'] * 1e3:.2f} ms of a core a row")
        costs = replace(costs, row_s=figures["row_s"])
    cores = options.nodes * 16
    print(f"{options.photos:,} photos, {options.gpus} GPUs, {options.nodes} nodes of 16 cores; so that no GPU waits:")
    results: dict[str, Any] = {"costs": asdict(costs)}
    for batch, frames in ((32, 16), (128, 64)):
        for name, work in works(costs, batch, frames).items():
            need = demand(work, options.gpus, costs)
            got = simulate(work, Cluster(options.gpus, cores), costs)
            epoch_s = options.photos / got.images_per_s
            print(
                f"  {name}, {work.images_per_row} a worker: {need.images_per_s:,.0f} img/s, {need.cores:,.0f} cores, "
                f"read {need.read_bytes_per_s / 1e9:.1f} GB/s in {need.requests_per_s:,.0f} requests/s, object stores "
                f"{need.store_bytes_per_s / 1e9:.1f} GB/s, scheduling {need.coordinator_cores:.2f} of its core\n"
                f"    simulated: {got.images_per_s:,.0f} img/s, an epoch in {epoch_s / 60:.1f} min, GPUs wait "
                f"{got.wait_fraction:.0%}; the loop serves {gpus_until(work, costs)} GPUs at most"
            )
            results[f"{name}, {batch if 'class' in name else frames}"] = {"demand": asdict(need), "got": asdict(got)}
    print(f"an epoch reads {options.photos * costs.photo_bytes / 1e12:.2f} TB of photos; the store of crops has "
          f"{options.photos * costs.stored_crop_bytes / 1e9:.0f} GB")  # fmt: skip
    for where, size in head_memory_bytes(options.photos, costs).items():
        print(f"  {where}: {size / 1e9:.2f} GB")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
