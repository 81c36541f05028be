"""First batch and memory of the stream for manifests of 1,000, 50,000 and 500,000 rows.

    python -m benchmarks.stream [--quick] [--json FILE]

One epoch over manifests of different lengths with the same small photos, read as in a train worker. Each length runs in
its own process tree; the shorter manifests are the control. Peak memory is private memory (resident minus shared); the
object store is listed separately.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from benchmarks.loader import run_watched

NUM_PHOTOS, SIDE_PX, CROP_PX, BATCH = 1000, 64, 32, 256
EPOCHS_PLANNED = 18


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the rows")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rows:
        print("FIGURES " + json.dumps(one_pass(options.folder, options.rows)))
        return
    lengths = (1_000, 5_000, 50_000) if options.quick else (1_000, 50_000, 500_000)
    results = {}
    with tempfile.TemporaryDirectory(prefix="pillsnap-bench-stream-") as folder:
        write_photos(Path(folder))
        print(f"{'rows':>10}{'first batch':>13}{'img/s':>9}{'processes':>11}{'object store':>14}{'spilled':>9}")
        for rows in lengths:
            command = [sys.executable, "-m", "benchmarks.stream", "--rows", str(rows), "--folder", folder]
            figures = run_watched(command)
            results[rows] = figures
            if "error" in figures:
                print(f"{rows:>10,}  failed: {figures['error']}")
                continue
            print(
                f"{rows:>10,}{figures['first_batch_s']:>11.2f} s{figures['images_per_s']:>9.0f}"
                f"{figures['peak_bytes'] / 2**30:>9.2f} G{figures['store_bytes'] / 2**20:>12.0f} M"
                f"{figures['spilled_bytes'] / 2**20:>7.0f} M"
            )
    long, short = results[lengths[2]], results[lengths[1]]
    if "error" not in long and "error" not in short:
        print(
            f"memory of {lengths[2]:,} rows to that of {lengths[1]:,}: {long['peak_bytes'] / short['peak_bytes']:.3f}"
        )
    if options.json:
        options.json.write_text(json.dumps(results, indent=2), encoding="utf-8")


def write_photos(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(NUM_PHOTOS):
        cv2.imwrite(str(folder / f"{number}.png"), rng.integers(0, 256, (SIDE_PX, SIDE_PX, 3), dtype=np.uint8))


def one_pass(folder: Path, num_rows: int) -> dict[str, float]:
    """One epoch of a training planned for 18; Ray is initialised before the measurement."""
    from pillsnap.cluster.session import ray_session
    from pillsnap.config import DataSettings
    from pillsnap.data.augment import CropJitter
    from pillsnap.data.malloc import return_freed_memory
    from pillsnap.data.plan import StreamPlan
    from pillsnap.data.recipes import CropRecipe
    from pillsnap.data.stream import Stream, batches_of, share_samples
    from pillsnap.photos.reader import PhotoReader

    with ray_session():
        started_s = time.time()
        samples = make_samples(num_rows)
        plan, settings = StreamPlan(0, EPOCHS_PLANNED, num_rows, 0, BATCH, 1), DataSettings()
        shared = share_samples(samples)
        stream = Stream(
            plan, CropRecipe(CROP_PX, 0.1, CropJitter()), PhotoReader(str(folder), 10**6), shared, shared,
            settings.batches_per_read, settings.decoding_cpus, decoders=os.cpu_count() or 1,
        )  # fmt: skip
        del samples
        return_freed_memory()  # as a training does
        (shard,) = stream.dataset().streaming_split(1, equal=True)
        seen, first_s, store_bytes = np.zeros(num_rows, np.int32), None, 0
        for batch in batches_of(shard):
            first_s = first_s or time.time()
            if batch["epoch"]:
                break
            members = batch["index"]
            seen[members[members >= 0]] += 1
            if batch["step"] % 50 == 0:
                store_bytes = max(store_bytes, _store_bytes())
        assert (seen == 1).all(), "a row was lost or doubled"
        assert first_s is not None
        ended_s = time.time()
        return {
            "first_batch_s": first_s - started_s,
            "images_per_s": num_rows / (ended_s - first_s),
            "steady_from_s": first_s,
            "steady_to_s": ended_s,
            "store_bytes": float(store_bytes),
            "spilled_bytes": _spilled_bytes(),
        }


def make_samples(num_rows: int) -> pa.Table:
    """Samples of a task, made without a Python object per row, whose memory would distort the measurement."""
    numbers = pa.array(np.arange(num_rows))
    photos = pc.cast(pa.array(np.arange(num_rows) % NUM_PHOTOS), pa.string())
    boxes = pa.array(np.tile(np.array([16.0, 16.0, 32.0, 32.0]), num_rows))
    return pa.table(
        {
            "sample_id": pc.binary_join_element_wise("sample", pc.cast(numbers, pa.string()), "-"),
            "location": pc.binary_join_element_wise(photos, "png", "."),
            "box": pa.ListArray.from_arrays(pa.array(np.arange(num_rows + 1, dtype=np.int32) * 4), boxes),
            "label": np.arange(num_rows) % 10,
        }
    )


def _store_bytes() -> int:
    import ray

    total, left = ray.cluster_resources(), ray.available_resources()
    return int(total.get("object_store_memory", 0) - left.get("object_store_memory", 0))


def _spilled_bytes() -> float:
    folder = Path(tempfile.gettempdir(), "ray", "session_latest")
    return float(sum(path.stat().st_size for path in folder.glob("ray_spilled_objects*/*") if os.path.isfile(path)))


if __name__ == "__main__":
    main()
