"""The part `stage3`: the preset stage3, in minutes, on 1,000 generated classes that only imprints tell apart.

Photos, manifest, detection, classification, evaluation, then `predict` and `export`. The preset's schedule, epochs,
sampling and store; its classifier is EfficientNet-Lite0, whose ImageNet weights can be carried (PILLSNAP_LITE0 names
the file), and nothing is compiled. The time budget is BUDGET_MINUTES, so that the run has to end early by itself.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from benchmarks.imprints import draw
from benchmarks.lease.report import Report
from benchmarks.lease.runs import assignments, pillsnap, short, start
from pillsnap.observe.events import EventFollower

CLASSES, VIEWS, COMBINATIONS = 1_000, 30, 1_600
BUDGET_MINUTES = 8.0
"""Of these the clock keeps 158 s for the evaluation: 6 were refused on slow cores."""
QUICK = {
    "detection.model": "yolo11n", "detection.image_size_px": 96, "detection.epochs": 4, "detection.batch_size": 8,
    "detection.samples_per_epoch": 32, "detection.validation_samples": 32, "detection.mosaic_off_epochs": 1,
    "classification.model": "resnet10t", "classification.weights": "random", "classification.image_size_px": 64,
    "classification.epochs": 4, "classification.samples_per_epoch": 64, "classification.batch_size": 16,
    "classification.validation_samples": 32,
}  # fmt: skip


def stage3(report: Report, folder: Path, quick: bool) -> None:
    tree, run = folder / "stage3-photos", folder / "stage3-run"
    for path in (tree, run):
        shutil.rmtree(path, ignore_errors=True)
    classes, views, combinations = (12, 10, 24) if quick else (CLASSES, VIEWS, COMBINATIONS)
    started_s = time.perf_counter()
    draw(tree, classes, views, combinations)
    drawn_s = time.perf_counter() - started_s
    share = combinations / (combinations + classes * views)
    chosen: dict[str, Any] = {
        "sampling.num_classes": classes, "sampling.num_photos": classes * views + combinations,
        "sampling.combination_fraction": round(share, 5), "detection.weights": "random",
        "classification.model": "tf_efficientnet_lite0",
        "classification.weights": os.environ.get("PILLSNAP_LITE0", "random"),
        "train.compile": "off", "train.time_budget_minutes": 2.0 if quick else BUDGET_MINUTES, "wandb.mode": "disabled",
    } | (QUICK if quick else {})  # fmt: skip
    common = ["--preset", "stage3", "--data-root", str(tree), *assignments(chosen)]
    pillsnap(["manifest", "build", *common, "--out", str(run)])
    report.line(
        f"photos drawn in {drawn_s:.0f} s, manifest after {time.perf_counter() - started_s:.0f} s", drawn_s=drawn_s
    )
    started_s, follower = time.perf_counter(), EventFollower(run)
    driver = start(["train", *common, "--run", str(run)])
    while True:
        code = driver.poll()
        for event in follower.poll():
            if line := _line(event):
                report.line(f"{time.perf_counter() - started_s:.0f} s: {line}")
        if code is not None:
            break
        time.sleep(0.5)
    seconds, budget_s = time.perf_counter() - started_s, 60 * chosen["train.time_budget_minutes"]
    report.check(code in (0, 1), f"exit status {code} (1: targets missed)")
    report.check(seconds < budget_s, f"train took {seconds:.0f} s of {budget_s:.0f} s")
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    kept = {part: metrics[part] for part in ("detection", "classification", "pipeline") if part in metrics}
    for part, figures in kept.items():
        report.line(f"judged {part}: {short(figures)}")
    report.line("all figures are in the file", seconds=seconds, metrics=kept)
    photos = sorted(path for path in tree.rglob("*.jpg"))[:8]
    for arguments in (["predict", "--run", str(run), *map(str, photos)], ["export", "--run", str(run)]):
        started_s = time.perf_counter()
        try:
            pillsnap(arguments)
            report.line(f"{arguments[0]} in {time.perf_counter() - started_s:.0f} s")
        except RuntimeError as error:
            report.problem(str(error))


def _line(event: dict[str, Any]) -> str | None:
    kind, task = event["kind"], event.get("task", "")
    if kind == "epoch":
        return (
            f"{task} epoch {event['epoch']}: {event['images_per_s']:.0f} img/s, "
            f"waits {event['data_wait_fraction']:.4f}, {event['duration_s']:.1f} s"
        )
    if kind == "validation":
        return f"{task} validation {event['epoch']}: {short(event['metrics'])}, {event['duration_s']:.1f} s"
    if kind in ("budget", "decay", "task", "warning", "failure", "verdict", "target"):
        fields = {key: value for key, value in event.items() if key not in ("v", "time", "kind")}
        return f"{kind} {json.dumps(fields, default=str)[:300]}"
    return None
