"""Processor time of the stream's scheduling loop per row, measured with rows that cost nothing to make.

    python -m benchmarks.scaling_costs [--quick] [--json FILE]

Processor time is independent of other work on the machine. The control is the same stream with rows of 9.6 MB, which
the loop hands over without reading them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

SIZES_PX = (1, 224)
_IMAGES_PER_ROW, _WORKERS = 64, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="seconds")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = {}
    for size_px in SIZES_PX:
        row_bytes = _IMAGES_PER_ROW * size_px**2 * 3
        results[row_bytes] = figures = measure_row_s(5.0 if options.quick else 30.0, size_px)
        print(
            f"rows of {row_bytes:,} bytes: {figures['rows_per_s']:.0f} per second, scheduling loop "
            f"{figures['row_s'] * 1e3:.2f} ms of a core per row"
        )
    if options.json:
        options.json.write_text(json.dumps(results, indent=2), encoding="utf-8")


@dataclass(frozen=True)
class EmptyRecipe:
    """Creates empty batches."""

    size_px: int

    def make(self, samples: Any, slot: Any, seed: int, capacity: int, source: Any, images: Any) -> dict[str, Any]:
        return {"image": images}


def measure_row_s(seconds: float, size_px: int = SIZES_PX[0]) -> dict[str, float]:
    """Rows per second of a stream without work, and the core seconds of scheduling per row."""
    import psutil

    from pillsnap.cluster.session import ray_session
    from pillsnap.data.plan import StreamPlan
    from pillsnap.data.stream import Stream, rows_of, share_samples
    from pillsnap.photos.reader import PhotoReader

    def used_s(title: str) -> float:
        total_s = 0.0
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # processes may end
                if title in " ".join(process.cmdline()):
                    total_s += sum(process.cpu_times()[:2])
        return total_s

    with ray_session():
        # Several workers with one batch per read, so that each batch is one row.
        plan = StreamPlan(0, 1_000_000, _IMAGES_PER_ROW, 0, _IMAGES_PER_ROW * _WORKERS, _WORKERS)
        shared = share_samples(pa.table({"sample_id": ["x"]}))
        recipe: Any = EmptyRecipe(size_px)
        stream = Stream(plan, recipe, PhotoReader(".", 1), shared, shared, _WORKERS, 0.5)
        (shard,) = stream.dataset().streaming_split(1, equal=True)
        rows = iter(rows_of(shard))
        begin_s = time.monotonic()
        while time.monotonic() - begin_s < seconds / 2:
            next(rows)
        before, begin_s, number = used_s("SplitCoordinator"), time.monotonic(), 0
        while time.monotonic() - begin_s < seconds:
            next(rows)
            number += 1
        took_s = time.monotonic() - begin_s
        figures = {"rows_per_s": number / took_s, "row_s": (used_s("SplitCoordinator") - before) / number}
        del rows  # before the coordinator ends
        return figures


if __name__ == "__main__":
    main()
