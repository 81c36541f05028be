"""Do the models read imprints? Pills that share shapes and colours, from random weights, on CPU cores alone.

    python -m benchmarks.imprints [--classes 200] [--out DIR] [--quick] [--json FILE]

Generates photos whose classes come in groups of six that only the imprint tells apart, trains both models with the
user commands, and evaluates them on camera views and combinations that were not trained on. The control is the best
accuracy of a classifier that sees shape, colour and size but no imprint. With --out the run is kept, and the same
command continues it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

VIEWS_PER_CLASS, COMBINATIONS = 36, 450
FRAME = "488x640"
TARGETS = {"top1": 0.95, "pill_accuracy": 0.90, "wall_s": 3600.0}
RECIPE: dict[str, Any] = {
    "name": "imprints",
    "detection.model": "yolo11n",
    "detection.image_size_px": 192,
    "detection.epochs": 1,
    "detection.batch_size": 16,
    "detection.lr": 2e-3,
    "detection.warmup_epochs": 0.25,
    "detection.mosaic_off_epochs": 1,
    "classification.model": "resnet10t",
    "classification.image_size_px": 96,
    "classification.epochs": 80,
    "classification.batch_size": 32,
    "classification.lr": 2e-3,
    "classification.label_smoothing": 0.05,
    "classification.crop_margin": 0.08,
    "data.store": "png",
    "evaluation.rotations": 4,
    "train.ema_warmup_steps": 100,
    "wandb.mode": "disabled",
}
QUICK = {
    "detection.image_size_px": 96,
    "detection.epochs": 1,
    "classification.image_size_px": 48,
    "classification.epochs": 1,
}


def prepare(folder: Path, classes: int, views: int, combinations: int, likeness: str = "shared") -> None:
    """Create photos and their manifest, split by group, if missing."""
    tree, run = folder / "photos", folder / "run"
    if (run / "manifest.parquet").exists():
        return
    share = combinations / (combinations + classes * views)
    draw(tree, classes, views, combinations, likeness)
    pillsnap(
        "manifest", "build", "--preset", "demo", "--data-root", str(tree), "--out", str(run),
        "--set", f"sampling.combination_fraction={share:.5f}", "--set", "sampling.val_fraction=0.2",
    )  # fmt: skip


def draw(tree: Path, classes: int, views: int, combinations: int, likeness: str = "shared") -> None:
    """Create the photos."""
    pillsnap(
        "synth", "--out", str(tree), "--classes", str(classes), "--singles", str(classes * views), "--combinations",
        str(combinations), "--frame", FRAME, "--format", "jpg", "--likeness", likeness,
    )  # fmt: skip


def train(folder: Path, quick: bool) -> dict[str, Any]:
    """Train and evaluate; returns the metrics with wall-clock and processor seconds."""
    run = folder / "run"
    settings = RECIPE | (QUICK if quick else {})
    assignments = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    resume = ["--resume"] if (run / "metrics.json").exists() else []
    started = time.monotonic()
    with ProcessorClock() as clock:
        pillsnap(
            "train", "--preset", "demo", "--run", str(run), "--data-root", str(folder / "photos"), *resume, *assignments
        )
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    return metrics | {"wall_s": time.monotonic() - started, "processor_s": clock.seconds()}


def pillsnap(*arguments: str) -> None:
    # Ray lowers the priority of its workers, which would wait for other work on the machine.
    environment = {"RAY_worker_niceness": "0"} | os.environ
    done = subprocess.run([sys.executable, "-m", "pillsnap.cli", *arguments], env=environment)
    if done.returncode > 1:  # 1 means targets missed
        raise SystemExit(done.returncode)


class ProcessorClock:
    """CPU seconds of all descendant processes, sampled."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[int, float], float] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> ProcessorClock:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def seconds(self) -> float:
        return sum(self._seconds.values())

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._ended.wait(2.0):
            for process in me.children(recursive=True):
                try:
                    times = process.cpu_times()
                    self._seconds[process.pid, process.create_time()] = times.user + times.system
                except psutil.Error:
                    continue


def unread_limit(classes: int) -> float:
    """Expected accuracy from shape, colors and size alone, guessing among pills that share them."""
    from pillsnap.synthetic.catalog import build_catalog

    return len({pill.look for pill in build_catalog(42, classes, "shared")}) / classes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=200)
    parser.add_argument("--out", type=Path, help="keep photos and run in this folder")
    parser.add_argument("--quick", action="store_true", help="12 classes, one epoch each: shows that it runs")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    classes, views, combinations = (12, 8, 12) if options.quick else (options.classes, VIEWS_PER_CLASS, COMBINATIONS)
    with tempfile.TemporaryDirectory(prefix="pillsnap-bench-") as temporary:
        folder = (options.out or Path(temporary)).absolute()
        started = time.monotonic()
        prepare(folder, classes, views, combinations)
        prepare_s = time.monotonic() - started
        metrics = train(folder, options.quick)
    limit = unread_limit(classes)
    if options.json:
        options.json.write_text(json.dumps(metrics | {"unread_limit": limit}, indent=2), encoding="utf-8")
    named, chained, facts = metrics["classification"], metrics["pipeline"], metrics["split_facts"]
    rows = [
        ("top-1, crops at the label boxes", named["top1"], TARGETS["top1"]),
        ("  of single photos", named["single"]["top1"], None),
        ("  of combination photos", named["combination"]["top1"], None),
        ("combination pills correct, end to end", chained["pill_accuracy"], TARGETS["pill_accuracy"]),
        ("detection mAP@0.5", metrics["detection"]["map50"], None),
        ("control: shape, colour and size alone", limit, None),
    ]
    print(f"{classes} classes, split {metrics['split']} by group: {json.dumps(facts)}")
    for name, value, target in rows:
        print(f"{name:40}{value:>8.4f}" + (f"   (target {target:.2f})" if target else ""))
    print(f"photos and manifest {prepare_s:.0f} s; both tasks as the run counts them {metrics['total_time_s']:.0f} s;")
    print(
        f"this command's training {metrics['wall_s']:.0f} s on the clock, {metrics['processor_s']:.0f} s on the "
        f"processors, over {os.cpu_count()} cores {metrics['processor_s'] / (os.cpu_count() or 1):.0f} s"
    )


if __name__ == "__main__":
    main()
