"""Training speed on this machine against the frameworks' own loops, end to end, and what it means for stage 3.

    python -m benchmarks.gpu [--quick] [--json FILE]

Four questions, each with its control in the same run: a training step fed one batch again and again, against timm's
task, optimizer and moving average put together as its training script does, and against ultralytics' own trainer fed
one batch again and again, at the same model, size, batch and precision; the whole of `pillsnap train` against the step
alone; the highest memory; the plan for stage 3. Under ten minutes on a GPU; `--quick` runs at toy size on a CPU.

On a GPU it first takes a step of each task under torch.cuda.set_sync_debug_mode("error"), with which CUDA refuses every
operation that would make the host wait for the device: the run ends there if a step does. The same is checked without a
GPU by tests/unit/train/test_no_waiting.py, as far as it shows there.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from pillsnap.config import Settings, load_settings
from pillsnap.train.measure import StepRates, measure_steps, mock_batch, this_device
from pillsnap.train.memory import MicroBatches
from pillsnap.train.peers import Peers
from pillsnap.train.readings import Readings
from pillsnap.train.state import TrainingState
from pillsnap.train.tasks import make_task

NUM_CLASSES = 1000
ROUNDS = 3
# Dense bfloat16 TFLOPS and memory bandwidth in GB/s, from the makers' data sheets: what a step takes on another card
# lies between the two ratios.
CARDS = {"H100": (989, 3350), "H200": (989, 4800), "A100": (312, 2039), "RTX 5080": (113, 960)}
TARGET_CARD = "RTX 5080"


def settings_for(quick: bool) -> Settings:
    toy: dict[str, Any] = {
        "detection.model": "yolo11n", "detection.image_size_px": 64, "detection.batch_size": 4,
        "classification.model": "resnet10t", "classification.image_size_px": 64, "classification.batch_size": 8,
        "train.compile": "off",
    }  # fmt: skip
    common = {"detection.weights": "random", "classification.weights": "random", "wandb.mode": "disabled"}
    return load_settings("stage3", common | (toy if quick else {}))


def our_step(settings: Settings, name: str, seconds: float) -> StepRates:
    task = make_task(name, settings, [f"K-{number:06}" for number in range(NUM_CLASSES)])
    return measure_steps(
        task, settings.train, this_device(), batch_size=task.settings.batch_size, seconds=seconds,
        num_classes=NUM_CLASSES,
    )  # fmt: skip


def step_without_waiting(settings: Settings, name: str) -> None:
    """One step in which CUDA refuses to wait. Raises RuntimeError where one would."""
    task = make_task(name, settings, [f"K-{number:06}" for number in range(NUM_CLASSES)])
    device, size = this_device(), task.settings.batch_size
    peers = Peers(device)
    state = TrainingState(
        task, settings.train, device, peers, MicroBatches(task.name, size, peers, None, print), None
    )  # fmt: skip
    batch, readings = mock_batch(task, size, device, NUM_CLASSES), Readings[int](device)
    for number in range(4):  # the first ones compile, tune and allocate
        torch.cuda.set_sync_debug_mode("error" if number == 3 else "default")
        try:
            step = state.step(batch, task.settings.lr, size, number)
            readings.send(torch.stack([step.bad.float(), *step.losses.values()]), number)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(not values[0] for _, values in readings.all())


def timm_step(settings: Settings, seconds: float) -> float:
    """Images a second of timm's own task, optimizer, moving average and clipping, in the order of its script."""
    import timm
    from timm.optim import create_optimizer_v2
    from timm.task import ClassificationTask
    from timm.utils import ModelEmaV3, dispatch_clip_grad

    from pillsnap.models.classifier import input_statistics, normalise
    from pillsnap.train.state import autocast

    chosen, device = settings.classification, this_device()
    model = timm.create_model(chosen.model, num_classes=NUM_CLASSES, drop_rate=chosen.drop_rate)
    model = model.to(device, memory_format=torch.channels_last).train()
    average = ModelEmaV3(model, decay=settings.train.ema_decay, use_warmup=True)
    optimizer = create_optimizer_v2(model, "adamw", lr=chosen.lr, weight_decay=chosen.weight_decay)
    statistics_ = input_statistics(model)
    compiled = torch.compile(model) if compiles(settings, device) else model
    task = ClassificationTask(compiled, criterion_kwargs={"smoothing": chosen.label_smoothing}, verbose=False)
    mixed = autocast(settings.train.amp, device)
    ours = make_task("classification", settings, [str(number) for number in range(NUM_CLASSES)])
    batch = mock_batch(ours, chosen.batch_size, device, NUM_CLASSES)

    def step() -> None:
        images = normalise(batch.images, *statistics_)
        with mixed():
            loss = task(images, batch.targets["label"])["loss"]
        loss.backward()
        dispatch_clip_grad(model.parameters(), settings.train.grad_clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        average.update(model, step=1)

    for _ in range(2):
        step()
    return chosen.batch_size / median_step(step, device, seconds)


def compiles(settings: Settings, device: torch.device) -> bool:
    return settings.train.compile == "on" or (settings.train.compile == "auto" and device.type == "cuda")


def median_step(step: Any, device: torch.device, seconds: float) -> float:
    durations: list[float] = []
    begun = time.perf_counter()
    while len(durations) < 2 or time.perf_counter() - begun < seconds:
        started = time.perf_counter()
        for _ in range(5 if device.type == "cuda" else 1):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        durations.append((time.perf_counter() - started) / (5 if device.type == "cuda" else 1))
    return statistics.median(durations)


class _Replay:
    """A loader that gives its first batch again and again; all else of it is the loader's own."""

    def __init__(self, loader: Any, steps: int) -> None:
        self._loader, self._steps = loader, steps

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Any:
        batch = next(iter(self._loader))
        device = this_device()
        batch = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
        for _ in range(self._steps):
            yield dict(batch)


def ultralytics_step(settings: Settings, folder: Path, steps: int) -> float:
    """Images a second of `DetectionTrainer.train()` itself, its loader replaced by one batch."""
    importlib.import_module("pillsnap.models.detector")  # keeps ultralytics from installing and reporting things
    from ultralytics.models.yolo.detect import DetectionTrainer

    chosen, device = settings.detection, this_device()
    data = yolo_folder(folder, chosen.batch_size)
    marks: list[float] = []
    warm = max(2, steps // 4)

    def mark(_: Any) -> None:
        if device.type == "cuda" and (len(marks) in (warm, steps - 1)):
            torch.cuda.synchronize(device)
        marks.append(time.perf_counter())

    class Done(Exception):
        pass

    class Trainer(DetectionTrainer):
        def get_dataloader(self, dataset_path: str, batch_size: int = 16, rank: int = 0, mode: str = "train") -> Any:
            loader = super().get_dataloader(dataset_path, batch_size, rank, mode)
            return _Replay(loader, steps) if mode == "train" else loader

        def validate(self) -> Any:
            raise Done

    overrides = {
        "model": f"{chosen.model}.yaml", "data": str(data), "imgsz": chosen.image_size_px, "batch": chosen.batch_size,
        "nbs": chosen.batch_size, "epochs": 1, "pretrained": False, "workers": 0, "plots": False, "verbose": False,
        "device": "0" if device.type == "cuda" else "cpu", "optimizer": "AdamW", "warmup_epochs": 0,
        "amp": "bf16" if device.type == "cuda" else False, "compile": compiles(settings, device),
        "project": str(folder / "runs"), "val": True,
    }  # fmt: skip
    trainer = Trainer(overrides=overrides)
    trainer.add_callback("on_train_batch_end", mark)
    with contextlib.suppress(Done):
        trainer.train()
    return chosen.batch_size * (steps - 1 - warm) / (marks[steps - 1] - marks[warm])


def yolo_folder(folder: Path, num_photos: int) -> Path:
    """Noise with three boxes a photo, as ultralytics reads it."""
    import cv2
    import numpy as np

    rng = np.random.default_rng(0)
    for kind in ("images", "labels"):
        (folder / kind / "train").mkdir(parents=True, exist_ok=True)
    for number in range(num_photos):
        cv2.imwrite(str(folder / f"images/train/{number}.jpg"), rng.integers(0, 256, (480, 640, 3), dtype=np.uint8))
        lines = [f"0 {x:.4f} {y:.4f} 0.2 0.2" for x, y in rng.uniform(0.2, 0.8, (3, 2))]
        (folder / f"labels/train/{number}.txt").write_text("\n".join(lines))
    path = folder / "data.yaml"
    path.write_text(f"path: {folder}\ntrain: images/train\nval: images/train\nnames: [pill]\n")
    return path


def end_to_end(settings: Settings, name: str, folder: Path, quick: bool) -> float:
    """Images a second of `pillsnap train`: the median over the epochs after the first."""
    from pillsnap.data.build import build_manifest
    from pillsnap.data.synthetic import generate
    from pillsnap.observe.events import read_events

    root, run = folder / "photos", folder / f"run-{name}"
    if not root.exists():
        frame = (244, 320) if quick else (976, 1280)
        generate(root, num_classes=8, num_singles=64 if quick else 1200, num_combinations=0, frame=frame)
    build_manifest(root, run, num_photos=None, num_classes=None, val_fraction=0.05)
    chosen = getattr(settings, name)
    changed = {
        "train.task": name, "train.compile": settings.train.compile, f"{name}.model": chosen.model,
        f"{name}.image_size_px": chosen.image_size_px, f"{name}.batch_size": chosen.batch_size,
        f"{name}.epochs": 3 if quick else 6, f"{name}.weights": "random", f"{name}.warmup_epochs": 0,
        "wandb.mode": "disabled",
    }  # fmt: skip
    command = [sys.executable, "-m", "pillsnap.cli", "train", "--preset", "stage3", "--run", str(run)]
    for key, value in changed.items():
        command += ["--set", f"{key}={value}"]
    done = subprocess.run(
        [*command, "--data-root", str(root)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    rates = [e["images_per_s"] for e in read_events(run) if e["kind"] == "epoch"]
    if len(rates) < 2:
        raise SystemExit(f"pillsnap train ended with {done.returncode}:\n{done.stdout[-2000:]}")
    return statistics.median(rates[1:])


def stage3_plan(settings: Settings, seconds: float, alternatives: bool) -> dict[str, Any]:
    from pillsnap.train.planner import make_plan
    from pillsnap.train.session import ray_session

    with ray_session():
        return make_plan(settings, None, seconds=seconds, alternatives=alternatives, say=lambda _: None)


def on_another_card(plan: dict[str, Any], card: str) -> str:
    """The stage's model time on `card`, by the published ratios to the card that was measured."""
    measured = next((name for name in CARDS if name in plan["device"]), None)
    if measured is None:
        return f"{card}: no published ratio to {plan['device']}"
    ratios = sorted(there / here for there, here in zip(CARDS[card], CARDS[measured], strict=True))
    model_s = sum(
        task["epochs"]
        * (task["num_train"] / task["model_images_per_s"] + task["num_val"] / task["validation_images_per_s"])
        for task in plan["tasks"]
    )
    slow, fast = (model_s / ratio / 60 for ratio in ratios)
    return f"{card}: {fast:.0f} to {slow:.0f} min of model time (memory bandwidth and arithmetic against {measured})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ.setdefault("YOLO_OFFLINE", "1")
    quick, settings = options.quick, settings_for(options.quick)
    seconds, steps = (0.3, 8) if quick else (6.0, 60)
    lacking = [name for name in ("ultralytics", "ray") if importlib.util.find_spec(name) is None]
    rows: list[tuple[str, float | None, float | None, float]] = []
    results: dict[str, Any] = {"device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"}
    peaks = {}
    with tempfile.TemporaryDirectory(prefix="pillsnap-bench-") as temporary:
        folder = Path(temporary)
        mock = {}
        for name in settings.tasks:
            if name == "detection" and "ultralytics" in lacking:
                continue
            if this_device().type == "cuda":
                step_without_waiting(settings, name)
                print(f"{name}: a step waits for nothing", flush=True)
            peer_name = "ultralytics' trainer" if name == "detection" else "timm's loop"
            ours, theirs = [], []
            for number in range(ROUNDS):  # interleaved: a warm card is slower, and so is a machine with other work
                rates = our_step(settings, name, seconds)
                ours.append(rates.train_images_per_s)
                if name == "detection":
                    theirs.append(ultralytics_step(settings, folder / f"yolo-{number}", steps))
                else:
                    theirs.append(timm_step(settings, seconds))
                peaks[name] = rates.peak_memory_bytes
            mock[name] = statistics.median(ours)
            rows.append((f"{name} step against {peer_name}", mock[name], statistics.median(theirs), 1.0))
        if "ray" not in lacking:
            for name in mock:
                rows.append(
                    (f"{name} end to end against its step", end_to_end(settings, name, folder, quick), mock[name], 0.97)
                )
            results["plan"] = stage3_plan(settings, 0.3 if quick else 4.0, alternatives=not quick)
    if "plan" in results:
        from pillsnap.train.plan_report import plan_lines

        print("\n".join(plan_lines(results["plan"])), end="\n\n")
    results["rows"] = [
        {"what": what, "ours": ours, "control": control, "ratio": ours / control, "wanted": wanted}
        for what, ours, control, wanted in rows
        if ours and control
    ]
    results["peak_memory_bytes"] = peaks
    if options.json:
        options.json.write_text(json.dumps(results, indent=2), encoding="utf-8")
    for name in lacking:
        print(f"skipped what needs {name}: it is not installed")
    for name in settings.tasks:
        s = getattr(settings, name)
        peak = peaks.get(name)
        memory = f", highest memory {peak / 2**30:.2f} GiB" if peak else ""
        print(f"{name}: {s.model} at {s.image_size_px} px, batch {s.batch_size}{memory}")
    if "plan" in results:
        print(on_another_card(results["plan"], TARGET_CARD))
    print(f"{results['device']}, torch {torch.__version__}")
    print(f"{'img/s':52}{'ours':>9}{'control':>9}{'ratio':>7}{'wanted':>8}")
    for row in results["rows"]:
        print(f"{row['what']:52}{row['ours']:>9.1f}{row['control']:>9.1f}{row['ratio']:>7.2f}{row['wanted']:>8.2f}")


if __name__ == "__main__":
    main()
