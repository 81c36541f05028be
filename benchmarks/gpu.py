"""Training speed on this machine against the frameworks' own loops, end to end, and what it means for stage 3.

    python -m benchmarks.gpu [--quick] [--parts PART ...] [--rounds N] [--json FILE]
    python -m benchmarks.gpu --lease [--quick] [--parts PART ...] [--json FILE] [--folder DIR]

With `--lease` it runs other parts, which fit into nine minutes of a borrowed machine: see benchmarks/lease/schedule.py.

Each part runs in a process of its own, has its control in the same process or says which part holds it, and prints its
figures when it has them; one that fails or hangs is named, and the others go on.

waits-TASK     on a GPU, a step under torch.cuda.set_sync_debug_mode("error"), with which CUDA refuses every operation
               that would make the host wait for the device; tests/unit/train/test_no_waiting.py checks the same
               without a GPU, as far as it can
step-TASK      a training step fed one batch again and again, against timm's task, optimizer and moving average put
               together as its training script does, or against ultralytics' own trainer fed one batch again and again,
               at the same model, size, batch and precision; the highest memory
store-TASK     the whole of `pillsnap train` from the decode-once store, against the step alone, and the share of its
               time that it waits for data
photos-TASK    the same, straight from the photos
plan           `pillsnap plan` for stage 3, and what it would be on an RTX 5080

Compiling takes most of the time, about two minutes a model on an H200's machine where nothing is cached; a later part
with the same model finds it done. `--quick` runs at toy size on a CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.steps.peers import timm_step, ultralytics_step
from pillsnap.config import Settings, load_settings
from pillsnap.errors import UserError
from pillsnap.models.precision import prefer_speed, this_device
from pillsnap.planner.cards import card_of, speed_ratios
from pillsnap.planner.measure import StepRates, measure_steps, mock_batch
from pillsnap.tasks.base import Task
from pillsnap.tasks.registry import make_task
from pillsnap.train.step.collectives import WorkerGroup
from pillsnap.train.step.device_readback import DeviceReadback
from pillsnap.train.step.microbatch import MicrobatchRunner
from pillsnap.train.step.training_state import TrainingState

TASKS = ("classification", "detection")
PARTS = (*(f"{kind}-{task}" for task in TASKS for kind in ("waits", "step", "store", "photos")), "plan")
PEERS = {"classification": "timm's loop", "detection": "ultralytics' trainer"}
PART_LIMIT_S = 420
EPOCHS = 5
TARGET_CARD = "RTX 5080"


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    num_classes: int
    num_photos: int
    """Rendered; a run's manifest names them as often as its rows need."""
    num_rows: dict[str, int]
    frame: tuple[int, int]
    seconds: float
    """Of each window in which steps are timed."""
    peer_steps: int


FULL = Size(1000, 2000, {"classification": 16_000, "detection": 6_000}, (976, 1280), 5.0, 60)
QUICK = Size(8, 64, {"classification": 512, "detection": 128}, (244, 320), 0.3, 8)


def settings_for(quick: bool) -> Settings:
    toy: dict[str, Any] = {
        "detection.model": "yolo11n", "detection.image_size_px": 64, "detection.batch_size": 4,
        "classification.model": "resnet10t", "classification.image_size_px": 64, "classification.batch_size": 8,
        "train.compile": "off",
    }  # fmt: skip
    common = {"detection.weights": "random", "classification.weights": "random", "wandb.mode": "disabled"}
    return load_settings("stage3", common | (toy if quick else {"classification.batch_size": 128}))


# --- a step alone -----------------------------------------------------------------------------------------------------


def step_part(settings: Settings, name: str, size: Size, rounds: int) -> dict[str, Any]:
    prefer_speed()
    ours, theirs = [], []
    for number in range(rounds):  # interleaved: a warm card is slower, and so is a machine with other work
        ours.append(our_step(settings, name, size))
        print(f"{name}: {ours[-1]}", flush=True)
        if name == "detection":
            with tempfile.TemporaryDirectory(prefix="pillsnap-bench-yolo-") as folder:
                theirs.append(ultralytics_step(settings, Path(folder), size.peer_steps))
        else:
            batch_size = settings.classification.batch_size
            batch = mock_batch(task_of(settings, name, size), batch_size, this_device(), size.num_classes)
            theirs.append(timm_step(settings, batch, size.num_classes, size.seconds))
        print(f"round {number + 1}: {ours[-1].train_images_per_s:.1f} against {theirs[-1]:.1f} img/s", flush=True)
    rate = statistics.median(one.train_images_per_s for one in ours)
    return {
        "rows": [row(f"{name} step against {PEERS[name]}", rate, statistics.median(theirs), 1.0)],
        "rounds": [one.train_images_per_s / other for one, other in zip(ours, theirs, strict=True)],
        "validation_images_per_s": ours[-1].val_images_per_s,
        "peak_memory_bytes": ours[-1].peak_memory_bytes,
        "first_step_s": [one.first_step_s for one in ours],
    }


def task_of(settings: Settings, name: str, size: Size) -> Task:
    return make_task(name, settings, [f"K-{number:06}" for number in range(size.num_classes)])


def our_step(settings: Settings, name: str, size: Size) -> StepRates:
    task = task_of(settings, name, size)
    return measure_steps(
        task, settings.train, this_device(), batch_size=task.settings.batch_size, seconds=size.seconds,
        num_classes=size.num_classes,
    )  # fmt: skip


def waits_part(settings: Settings, name: str, size: Size) -> dict[str, Any]:
    """One step in which CUDA refuses to wait. Raises RuntimeError where one would."""
    prefer_speed()
    task, device = task_of(settings, name, size), this_device()
    num_samples, group, on_gpu = task.settings.batch_size, WorkerGroup(device), device.type == "cuda"
    state = TrainingState(
        task, settings.train, device, group, MicrobatchRunner(task.name, num_samples, group, None, print), None
    )  # fmt: skip
    batch, readings = mock_batch(task, num_samples, device, size.num_classes), DeviceReadback[int](device)
    for number in range(4):  # the first ones compile, tune and allocate
        if on_gpu:
            torch.cuda.set_sync_debug_mode("error" if number == 3 else "default")
        try:
            step = state.step(batch, task.settings.lr, num_samples, number)
            readings.send(torch.stack([step.bad.float(), *step.losses.values()]), number)
        finally:
            if on_gpu:
                torch.cuda.set_sync_debug_mode("default")
    assert all(not values[0] for _, values in readings.all())
    print(f"{name}: a step waits for nothing" if on_gpu else "no GPU: nothing that could be waited for", flush=True)
    return {"rows": []}


# --- end to end -------------------------------------------------------------------------------------------------------


def end_to_end_part(settings: Settings, name: str, folder: Path, size: Size, store: bool) -> dict[str, Any]:
    """`pillsnap train`: the median over the epochs after the first; the step alone is measured after it."""
    from pillsnap.observe.events import read_events

    root, run = folder / f"photos-{size.num_photos}", folder / f"run-{name}-{'store' if store else 'photos'}"
    shutil.rmtree(run, ignore_errors=True)  # else a run that is kept there would be continued
    write_run(root, run, size.num_rows[name], size)
    chosen = getattr(settings, name)
    changed = {
        "train.task": name, "train.compile": settings.train.compile, f"{name}.model": chosen.model,
        f"{name}.image_size_px": chosen.image_size_px, f"{name}.batch_size": chosen.batch_size,
        f"{name}.epochs": EPOCHS, f"{name}.weights": "random", f"{name}.warmup_epochs": 0,
        "data.store": "jpeg" if store else "off", "wandb.mode": "disabled",
    }  # fmt: skip
    if store:
        pillsnap("prepare", root, run, changed)
    pillsnap("train", root, run, changed)
    first, *epochs = (event for event in read_events(run) if event["kind"] == "epoch")
    rate = statistics.median(event["images_per_s"] for event in epochs)
    wait = statistics.median(event["data_wait_fraction"] for event in epochs)
    prefer_speed()
    alone = our_step(settings, name, size).train_images_per_s
    source = "store" if store else "photos"
    keys = ("images_per_s", "data_wait_fraction", "loader_ms", "duration_s")
    return {
        "rows": [
            row(f"{name} from {source} against its step", rate, alone, 0.97),
            {"what": f"{name} from {source}: share of time waiting for data", "ours": wait, "wanted": 0.02},
        ],
        "epochs": [{key: event[key] for key in keys} for event in (first, *epochs)],
    }


def write_run(root: Path, run: Path, num_rows: int, size: Size) -> None:
    """A run directory whose manifest names the photos under `root` again and again, under new sample ids."""
    import pyarrow as pa
    import pyarrow.compute as pc

    from pillsnap.manifest.build import build_manifest
    from pillsnap.manifest.table import class_list, read_manifest, write_manifest
    from pillsnap.synthetic import generate

    if not root.exists():
        generate(root, num_classes=size.num_classes, num_singles=size.num_photos, num_combinations=0, frame=size.frame)
    build_manifest(root, run, num_photos=None, num_classes=None, val_fraction=0.05)
    once = read_manifest(run)
    column = once.schema.get_field_index("sample_id")
    copies = [
        once.set_column(column, "sample_id", pc.binary_join_element_wise(once["sample_id"], str(number), "-"))
        for number in range(num_rows // size.num_photos)
    ]
    table = pa.concat_tables(copies)
    write_manifest(table, run, class_list(table))


def pillsnap(command: str, root: Path, run: Path, changed: dict[str, Any]) -> None:
    line = [sys.executable, "-m", "pillsnap.cli", command, "--preset", "stage3", "--run", str(run)]
    for key, value in changed.items():
        line += ["--set", f"{key}={value}"]
    started_s = time.perf_counter()
    status = subprocess.run([*line, "--data-root", str(root)]).returncode
    print(f"pillsnap {command}: {time.perf_counter() - started_s:.0f} s, exit status {status}", flush=True)


# --- stage 3 ----------------------------------------------------------------------------------------------------------


def plan_part(settings: Settings, size: Size) -> dict[str, Any]:
    from pillsnap.cluster.session import ray_session
    from pillsnap.planner.estimate import estimate
    from pillsnap.planner.report import report_lines

    prefer_speed()
    with ray_session():
        plan = estimate(settings, None, seconds=size.seconds, alternatives=False, say=print)
    print("\n".join(report_lines(plan)))
    print(on_another_card(plan, TARGET_CARD))
    return {"rows": [], "plan": plan}


def on_another_card(plan: dict[str, Any], card: str) -> str:
    """The stage's model time on `card`, by the published ratios to the card that was measured."""
    try:
        measured = card_of(plan["device"])
    except UserError as error:
        return str(error)
    slow, fast = speed_ratios(card, measured)
    model_s = sum(
        task["num_train_seen"] / task["model_images_per_s"] + task["num_val_seen"] / task["validation_images_per_s"]
        for task in plan["tasks"]
    )
    return (
        f"{card}: {model_s / fast / 60:.0f} to {model_s / slow / 60:.0f} min of model time (memory bandwidth and "
        f"arithmetic against {measured})"
    )


# --- all parts --------------------------------------------------------------------------------------------------------


def row(what: str, ours: float, control: float, wanted: float) -> dict[str, Any]:
    return {"what": what, "ours": ours, "control": control, "ratio": ours / control, "wanted": wanted}


def run_part(part: str, settings: Settings, folder: Path, quick: bool, rounds: int) -> dict[str, Any]:
    size = QUICK if quick else FULL
    if part == "plan":
        return plan_part(settings, size)
    kind, name = part.split("-")
    if kind == "waits":
        return waits_part(settings, name, size)
    if kind == "step":
        return step_part(settings, name, size, rounds)
    return end_to_end_part(settings, name, folder, size, store=kind == "store")


def in_own_process(part: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One part's figures; of a failed one, `failed` says how it ended."""
    result = folder / f"{part}.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", part, "--folder", str(folder), "--json", str(result)]
    command += ["--rounds", str(options.rounds)] + ["--quick"] * options.quick
    print(f"--- {part}", flush=True)
    started_s = time.perf_counter()
    process = subprocess.Popen(command)
    try:
        status: int | str = process.wait(PART_LIMIT_S)
    except subprocess.TimeoutExpired:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
        status = f"no result after {PART_LIMIT_S} s"
    figures = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {"rows": [], "failed": status}
    print(f"--- {part}: {time.perf_counter() - started_s:.0f} s, ended with {status}", flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--lease", action="store_true", help="the parts that fit into nine minutes")
    parser.add_argument("--parts", nargs="+", metavar="PART", help="[default: all]")
    parser.add_argument("--rounds", type=int, default=3, help="of a step against its control")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help="keep photos and runs here [default: a temporary folder]")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.setdefault("YOLO_OFFLINE", "1")
    if options.lease:
        from benchmarks.lease.schedule import run_lease

        run_lease(options)
    if unknown := set(options.parts or ()) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if options.part:
        figures = run_part(options.part, settings_for(options.quick), options.folder, options.quick, options.rounds)
        options.json.write_text(json.dumps(figures, indent=2), encoding="utf-8")
        return
    results = {}
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pillsnap-bench-")))
        folder.mkdir(parents=True, exist_ok=True)
        for part in options.parts or PARTS:
            results[part] = in_own_process(part, options, folder)
            if options.json:
                options.json.write_text(json.dumps(results, indent=2), encoding="utf-8")
    print_table(results, settings_for(options.quick))
    if any("failed" in figures for figures in results.values()):
        sys.exit(1)


def print_table(results: dict[str, Any], settings: Settings) -> None:
    print(f"{torch.cuda.get_device_name(0) if torch.cuda.is_available() else 'CPU'}, torch {torch.__version__}")
    for name in TASKS:
        chosen, peak = getattr(settings, name), results.get(f"step-{name}", {}).get("peak_memory_bytes")
        memory = f", highest memory {peak / 2**30:.2f} GiB" if peak else ""
        print(f"{name}: {chosen.model} at {chosen.image_size_px} px, batch {chosen.batch_size}{memory}")
    print(f"{'img/s':56}{'ours':>9}{'control':>9}{'ratio':>7}{'wanted':>8}")
    for part, figures in results.items():
        if "failed" in figures:
            print(f"{part} failed: {figures['failed']}")
        for one in figures["rows"]:
            if "control" in one:
                print(
                    f"{one['what']:56}{one['ours']:>9.1f}{one['control']:>9.1f}{one['ratio']:>7.3f}{one['wanted']:>8.2f}"
                )
            else:
                print(f"{one['what']:56}{one['ours']:>25.4f}{'< ' + str(one['wanted']):>8}")


if __name__ == "__main__":
    main()
