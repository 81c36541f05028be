"""Parts that run `pillsnap` itself.

end-to-end                   both tasks, stopped in the middle and continued by the same command, then evaluated
photos, prepare-TASK         photos and a filled store for the parts below
store-TASK                   training from the store: share of time waiting for data, rate against the step alone
store-TASK-compiled          the same with a compiled model
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.lease.report import Report, read_report
from benchmarks.lease.steps import NUM_CLASSES, settings_of

STEP_PART = {"classification": "classification-128", "detection": "detection-yolo11m"}
"""The part that has timed the step alone, with the same model and batch."""

# --- end to end -------------------------------------------------------------------------------------------------------


def end_to_end(report: Report, folder: Path, quick: bool) -> None:
    """`pillsnap train` with an interruption in detection's second epoch."""
    from pillsnap.synthetic import generate

    root, run, epochs = folder / "e2e-photos", folder / "e2e-run", 2
    shutil.rmtree(run, ignore_errors=True)
    shutil.rmtree(root, ignore_errors=True)
    singles, combinations = (48, 16) if quick else (480, 160)
    generate(root, num_classes=8, num_singles=singles, num_combinations=combinations, frame=(320, 244))
    chosen = {
        "detection.model": "yolo11n", "detection.image_size_px": 96 if quick else 320, "detection.epochs": epochs,
        "detection.batch_size": 8 if quick else 16, "detection.mosaic_off_epochs": 1,
        "classification.model": "resnet10t" if quick else "tf_efficientnetv2_b0", "classification.epochs": epochs,
        "classification.image_size_px": 64 if quick else 192, "classification.batch_size": 16 if quick else 32,
        "train.compile": "off", "train.log_every_steps": 2, "wandb.mode": "disabled",
    }  # fmt: skip
    common = ["--preset", "demo", "--data-root", str(root)]
    pillsnap(["manifest", "build", *common, "--out", str(run)])
    line = ["train", *common, "--run", str(run), *assignments(chosen)]

    driver = start(line)
    stopped = _wait_for(driver, run, lambda events: any(e["kind"] == "step" and e["epoch"] >= 2 for e in events))
    report.line(f"a step of detection's second epoch seen: {stopped}")
    driver.send_signal(signal.SIGINT)
    code = driver.wait()
    events = events_of(run)
    position = next((event["step"] for event in reversed(events) if event["kind"] == "checkpoint"), None)
    report.check(code == 130, f"SIGINT: exit status {code}, last checkpoint at step {position}, "
                              f"{_epochs(events, 'detection')} epochs of detection")  # fmt: skip
    driver = start(line)
    code = driver.wait()
    _report_run(report, run, epochs, code)


def _report_run(report: Report, run: Path, epochs: int, code: int) -> None:
    events = events_of(run)
    starts = [event for event in events if event["kind"] == "task" and event["status"] == "started"]
    report.check(code in (0, 1), f"the same command again: exit status {code} (1: targets missed)")
    resumed = [f"{start['task']} at step {start['step']}" for start in starts if start["step"] > 0]
    report.check(len(resumed) == 1 and len(starts) == 3, f"{len(starts)} starts (wanted 3), continued: {resumed}")
    for task in ("detection", "classification"):
        mine = [event for event in events if event.get("task") == task]
        finished = any(event["kind"] == "task" and event["status"] == "finished" for event in mine)
        ended = [event["epoch"] for event in mine if event["kind"] == "validation"]
        steps = [event for event in mine if event["kind"] == "step"]
        losses = [event["loss"] for event in steps]
        peak = max((event.get("gpu_memory_bytes") or 0 for event in steps), default=0)
        report.check(
            finished and ended == list(range(1, epochs + 1)) and None not in losses and bool(losses),
            f"{task}: finished {finished}, validated epochs {ended} of {epochs}, loss {losses[:1]} -> {losses[-1:]}, "
            f"GPU memory {peak / 2**30:.2f} GiB",
        )  # fmt: skip
        figures = [event["metrics"] for event in mine if event["kind"] == "validation"]
        report.line(f"{task}: last validation {short(figures[-1] if figures else {})}")
    warnings = Counter(event["message"] for event in events if event["kind"] in ("warning", "failure"))
    for message, count in list(warnings.items())[:6]:
        report.line(f"{count} x warning: {message[:220]}")
    restarts = [message for message in warnings if "stopped (" in message or "estart" in message]
    report.check(not restarts, f"{len(restarts)} warnings of stopped or restarted workers, {len(warnings)} in all")
    verdicts = [event for event in events if event["kind"] == "verdict"]
    metrics = json.loads((run / "metrics.json").read_text()) if (run / "metrics.json").exists() else {}
    pipeline = metrics.get("pipeline") or {}
    report.check(bool(verdicts) and (run / "report.html").exists(), f"evaluated: {short(pipeline)}")
    begun = [event["time"] for event in events if event["kind"] == "run"]
    if begun and verdicts:
        seconds = verdicts[-1]["time"] - begun[0]
        report.line(f"from the first start to the verdict {seconds:.0f} s", events_s=seconds)


def short(figures: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in figures.items() if isinstance(value, float))


# --- from the store ---------------------------------------------------------------------------------------------------


def photos(report: Report, folder: Path, quick: bool) -> None:
    """Photos of full size, rendered on half of the cores."""
    from pillsnap.synthetic import generate

    size, workers = _size(quick), max(1, (os.cpu_count() or 2) // 2)
    shutil.rmtree(_photos(folder, quick), ignore_errors=True)
    tree = generate(
        _photos(folder, quick), num_classes=size.num_classes, num_singles=size.num_photos, num_combinations=0,
        frame=size.frame, num_workers=workers,
    )  # fmt: skip
    report.line(f"{tree.num_photos} photos of {size.frame} in {tree.seconds:.0f} s on {workers} processes")


def prepare(report: Report, task: str, folder: Path, quick: bool) -> None:
    """A run whose manifest names the photos again and again, and its store, filled."""
    from benchmarks.gpu import write_run
    from pillsnap.manifest.table import class_list, read_manifest, write_manifest

    root, run, size = _photos(folder, quick), folder / f"store-{task}-run", _size(quick)
    shutil.rmtree(run, ignore_errors=True)
    write_run(root, run, size.num_rows[task], size)
    settings = settings_of(STEP_PART[task], quick)
    table, batch_size = read_manifest(run), getattr(settings, task).batch_size
    # Whole batches alone: the detector would be compiled again for an epoch's last, smaller one.
    training = [number for number, split in enumerate(table["split"].to_pylist()) if split == "train"]
    dropped = set(training[: len(training) % batch_size])
    table = table.take([number for number in range(len(table)) if number not in dropped])
    classes = class_list(table)
    write_manifest(table, run, classes)
    started_s = time.perf_counter()
    pillsnap(["prepare", *_run_line(root, run, task, settings, "off")])
    report.line(
        f"store of {len(table)} samples in {time.perf_counter() - started_s:.0f} s, {len(classes)} classes, "
        f"{(len(training) - len(dropped)) // batch_size} steps an epoch"
    )


def store(report: Report, task: str, compiled: bool, folder: Path, quick: bool) -> None:
    """Training from the store until `epochs` have been trained; the first epoch, which compiles, does not count."""
    root, filled, settings = _photos(folder, quick), folder / f"store-{task}-run", settings_of(STEP_PART[task], quick)
    run = folder / f"store-{task}-{'compiled' if compiled else 'eager'}-run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(filled, run)
    step = read_report(folder / f"{STEP_PART[task]}.json")["figures"]
    alone = step.get("compiled_images_per_s" if compiled else "eager_images_per_s") or float("nan")
    wanted, shown = _store_epochs(quick), 0
    compile_ = "off" if not compiled or settings.train.compile == "off" else "auto"
    driver = start(["train", *_run_line(root, run, task, settings, compile_)])
    while True:
        alive = driver.poll() is None
        events = events_of(run)
        epochs = [event for event in events if event["kind"] == "epoch"]
        for event in epochs[shown:]:
            loader_ms = {name: round(value, 3) for name, value in (event.get("loader_ms") or {}).items()}
            report.line(
                f"{task} epoch {event['epoch']}: {event['images_per_s']:.1f} img/s, waits "
                f"{event['data_wait_fraction']:.4f}, {event['duration_s']:.1f} s, ms an image {loader_ms}"
            )
        if len(epochs) > shown and len(epochs) > 1:
            _summarise(report, task, epochs[1:], alone)
        shown = len(epochs)
        if shown >= wanted or not alive:
            break
        time.sleep(0.5)
    for message in {event["message"] for event in events if event["kind"] in ("warning", "failure")}:
        report.line(f"warning: {message[:200]}")
    if shown < wanted:
        report.problem(f"the run ended with status {driver.returncode} after {shown} of {wanted} epochs")
    # The caller kills what is left of the run.


def _summarise(report: Report, task: str, epochs: list[dict[str, Any]], alone: float) -> None:
    rate = statistics.median(event["images_per_s"] for event in epochs)
    wait = statistics.median(event["data_wait_fraction"] for event in epochs)
    report.line(
        f"{task} from the store, epochs 2 to {epochs[-1]['epoch']}: {rate:.1f} img/s, {rate / alone:.3f} of its step's "
        f"{alone:.1f} (wanted 0.97); waits for data {wait:.4f} (wanted < 0.02)",
        images_per_s=rate, ratio=rate / alone, data_wait_fraction=wait,
    )  # fmt: skip


def _store_epochs(quick: bool) -> int:
    return 2 if quick else 3


def _size(quick: bool) -> Any:
    from benchmarks.gpu import FULL, QUICK

    if quick:
        return replace(QUICK, num_rows={"classification": 192, "detection": 64})
    rows = {"classification": 12_800, "detection": 4_000}
    return replace(FULL, num_classes=NUM_CLASSES, num_photos=800, num_rows=rows)


def _photos(folder: Path, quick: bool) -> Path:
    return folder / f"photos-{_size(quick).num_photos}"


def _run_line(root: Path, run: Path, task: str, settings: Any, compile_: str) -> list[str]:
    chosen = getattr(settings, task)
    changed = {
        "train.task": task, "train.compile": compile_,
        f"{task}.model": chosen.model, f"{task}.image_size_px": chosen.image_size_px,
        f"{task}.batch_size": chosen.batch_size, f"{task}.epochs": _store_epochs(False) + 2,
        f"{task}.weights": "random", f"{task}.warmup_epochs": 0, "data.store": "jpeg", "wandb.mode": "disabled",
    }  # fmt: skip
    return ["--preset", "stage3", "--run", str(run), "--data-root", str(root), *assignments(changed)]


# --- the command ------------------------------------------------------------------------------------------------------


def assignments(values: dict[str, Any]) -> list[str]:
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


def start(arguments: list[str]) -> subprocess.Popen[bytes]:
    print("pillsnap", *arguments, flush=True)
    return subprocess.Popen([sys.executable, "-m", "pillsnap.cli", *arguments])


def pillsnap(arguments: list[str]) -> None:
    if code := start(arguments).wait():
        raise RuntimeError(f"pillsnap {arguments[0]} ended with status {code}")


def _wait_for(driver: subprocess.Popen[bytes], run: Path, seen: Callable[[list[dict[str, Any]]], bool]) -> bool:
    """Whether it was seen before the driver ended."""
    while driver.poll() is None:
        if seen(events_of(run)):
            return True
        time.sleep(0.1)
    return False


def events_of(run: Path) -> list[dict[str, Any]]:
    from pillsnap.observe.events import read_events

    return list(read_events(run)) if (run / "events.jsonl").exists() else []


def _epochs(events: list[dict[str, Any]], task: str) -> int:
    return sum(event["kind"] == "epoch" and event["task"] == task for event in events)
