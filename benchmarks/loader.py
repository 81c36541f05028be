"""Loaders side by side: the limit of the machine, PillSnap's loaders and others, over the same photos.

    python -m benchmarks.loader [--quick] [--rounds N] [--only NAME ...] [--phone] [--folder DIR] [--json FILE]

Photos of 976 x 1280 pixels (with `--phone`: JPEG photos of 12 megapixels, straight from the photos only) become
shuffled uint8 batches of 224 px crops (and 640 px mosaics) on all cores. Each loader runs in its own process, in turn,
in rounds; values are medians. CPU is the CPU time of all its processes in the steady state. The limit: one process per
core that reads, decodes and warps, without handing anything over. Loaders that are not installed are skipped:
pip install webdataset litdata mosaicml-streaming spdl nvidia-dali-cuda130.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

TABLES = {
    "crops of 224 px straight from the photos": (
        "limit_photos", "direct", "torch_photos", "timm_photos",
    ),
    "crops of 224 px from prepared JPEG crops": (
        "limit_crops", "store_workers", "store_tasks", "torch_crops", "webdataset", "litdata", "mosaicml", "spdl",
        "dali",
    ),
    "mosaics of 640 px straight from the photos": ("detection", "ultralytics_photos"),
    "one batch over and over": ("mock",),
}  # fmt: skip
OURS = ("direct", "store_tasks", "store_workers", "detection")
FROM_PHOTOS = ("limit_photos", "direct", "torch_photos", "timm_photos", "detection", "ultralytics_photos")
NEEDS = {
    "webdataset": "webdataset",
    "litdata": "litdata",
    "mosaicml": "streaming",
    "spdl": "spdl",
    "dali": "nvidia.dali",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few photos, seconds, one round: shows that it runs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", help="only these loaders")
    parser.add_argument("--phone", action="store_true", help="photos as of a phone: JPEG of 12 megapixels")
    parser.add_argument("--folder", type=Path, help="keep the prepared photos here [default: a temporary folder]")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--no-gap", action="store_true", help="do not measure the gap between epochs")
    options = parser.parse_args()
    if options.contender:
        figures = run_contender(options.contender, options.folder, options.seconds, not options.no_gap)
        print("FIGURES " + json.dumps(figures))
        return
    folder = options.folder or Path(tempfile.mkdtemp(prefix="pillsnap-bench-loader-"))
    rounds, seconds = (1, 3.0) if options.quick else (options.rounds, options.seconds)
    try:
        if not (folder / "boxes.npy").exists():
            prepare_data(folder, 100 if options.quick or options.phone else 1000, options.phone)
        wanted = options.only or (FROM_PHOTOS if options.phone else [])
        names = [name for group in TABLES.values() for name in group if not wanted or name in wanted]
        results = run_all([name for name in names if is_installed(name)], folder, rounds, seconds, not options.no_gap)
        print_tables(results, names, folder)
    finally:
        if not options.folder:
            shutil.rmtree(folder, ignore_errors=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2), encoding="utf-8")


def is_installed(name: str) -> bool:
    import importlib.util

    try:
        return name not in NEEDS or importlib.util.find_spec(NEEDS[name]) is not None
    except ModuleNotFoundError:
        return False


def prepare_data(folder: Path, num_photos: int, phone: bool) -> None:
    import ray

    from benchmarks.loaders.data import prepare
    from pillsnap.cluster.session import ray_session

    with ray_session():
        prepare(folder, num_photos, phone)
    assert not ray.is_initialized()


def run_contender(name: str, folder: Path, seconds: float, gap: bool) -> dict[str, float]:
    """Measure one loader in this process; Ray is initialised before the measurement."""
    from benchmarks.loaders import measure, ours, peers
    from benchmarks.loaders.data import Prepared

    data = Prepared(folder)
    if name.startswith("limit"):
        return ours.limit(data, seconds, stored=name == "limit_crops")
    if name not in OURS:
        started_s = time.time()
        batches = ours.mock(data) if name == "mock" else getattr(peers, name)(data)
        return measure.measure(batches, started_s, seconds, gap)
    from pillsnap.cluster.session import ray_session

    with ray_session():
        return ours.measure_stream(getattr(ours, name)(data), seconds, gap)


def run_all(
    names: list[str], folder: Path, rounds: int, seconds: float, gap: bool
) -> dict[str, list[dict[str, float]]]:
    """Metrics of every loader, one entry per round."""
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names:
            command = [sys.executable, "-m", "benchmarks.loader", "--contender", name, "--folder", str(folder)]
            started_s = time.monotonic()
            figures = run_watched([*command, "--seconds", str(seconds)] + ["--no-gap"] * (not gap))
            results[name].append(figures)
            shown = f"{figures['images_per_s']:.0f} img/s" if "images_per_s" in figures else figures["error"]
            print(f"round {turn + 1} of {rounds}: {name}: {shown} ({time.monotonic() - started_s:.0f} s)", flush=True)
    return results


def run_watched(command: list[str]) -> dict[str, Any]:
    """The metrics that a command prints, plus CPU time per image between its `steady_from_s` and `steady_to_s` and peak
    memory, both of its process tree.
    """
    with tempfile.TemporaryFile("w+") as errors:
        # Ray lowers the priority of its workers, which other loaders do not.
        environment = os.environ | {"RAY_worker_niceness": "0"}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
        watch = _Watch(process.pid)
        output, _ = process.communicate()
        figures = next((json.loads(line[8:]) for line in output.splitlines() if line.startswith("FIGURES ")), None)
        if figures is None:
            errors.seek(0)
            return {"error": (errors.read().strip().splitlines() or ["no output"])[-1][:300]}
    return figures | watch.figures(figures)


class _Watch(threading.Thread):
    """Samples the private memory and CPU time of a process tree, four times per second."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._pid, self._peak, self._ended = pid, 0, threading.Event()
        self._cpu_s: dict[int, float] = {}
        self._readings: list[tuple[float, float]] = []
        """(unix time, processor seconds so far)"""
        self.start()

    def run(self) -> None:
        import psutil

        while not self._ended.wait(0.25):
            try:
                root = psutil.Process(self._pid)
                members = [root, *root.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            own = 0
            for member in members:
                try:
                    memory, times = member.memory_info(), member.cpu_times()
                except psutil.NoSuchProcess:
                    continue
                own += memory.rss - memory.shared
                self._cpu_s[member.pid] = times.user + times.system
            self._peak = max(self._peak, own)
            self._readings.append((time.time(), sum(self._cpu_s.values())))

    def figures(self, steady: dict[str, float]) -> dict[str, float]:
        self._ended.set()
        times, totals = zip(*self._readings, strict=True)
        begin_s, end_s = steady["steady_from_s"], steady["steady_to_s"]
        used_s = np.diff(np.interp([begin_s, end_s], times, totals)).item()
        images = steady["images_per_s"] * (end_s - begin_s)
        return {"peak_bytes": self._peak, "cpu_ms_per_image": 1000 * used_s / images}


def print_tables(results: dict[str, list[dict[str, float]]], names: list[str], folder: Path) -> None:
    from benchmarks.loaders.data import STORE_REPEATS

    for title, group in TABLES.items():
        shown = [name for name in group if name in names]
        if not shown:
            continue
        print(f"\n{title}")
        print(f"{'':20}{'img/s':>8}{'of limit':>10}{'first batch':>13}{'epoch gap':>11}{'CPU/image':>14}{'memory':>9}")
        limits = [
            median(results[name], "images_per_s") for name in shown if name.startswith("limit") and name in results
        ]
        for name in shown:
            if name not in results:
                print(f"{name:20}not installed")
                continue
            rate = median(results[name], "images_per_s")
            if rate is None:
                print(f"{name:20}failed: {results[name][0].get('error')}")
                continue
            ratio = f"{rate / limits[0]:.3f}" if limits and limits[0] else ""
            first, gap = median(results[name], "first_batch_s"), median(results[name], "epoch_gap_s")
            cpu_ms, peak = median(results[name], "cpu_ms_per_image") or 0, median(results[name], "peak_bytes") or 0
            print(
                f"{name:20}{rate:>8.0f}{ratio:>10}{'' if first is None else f'{first:.2f} s':>13}"
                f"{'' if gap is None else f'{gap:.3f} s':>11}{f'{cpu_ms:.3f} ms':>14}{peak / 2**30:>7.2f} G"
            )
    sizes = {
        "photos": "photos",
        "store": "run/store",
        "JPEG files": "crops",
        "tar": "tar",
        "LitData": "litdata",
        "MDS": "mds",
    }
    print(f"\nsize on disk (tar, LitData and MDS hold every crop {STORE_REPEATS} times):")
    for name, part in sizes.items():
        size = sum(path.stat().st_size for path in (folder / part).rglob("*") if path.is_file())
        print(f"  {name:12}{size / 1e6:>10.1f} MB")


def median(rows: list[dict[str, float]], key: str) -> float | None:
    values = [row[key] for row in rows if key in row and row[key] == row[key]]
    return statistics.median(values) if values else None


if __name__ == "__main__":
    main()
