"""A training step of other frameworks, each as its own training code makes it, fed one batch again and again."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pillsnap.config import Settings
from pillsnap.data.loader import DeviceBatch
from pillsnap.models.compiling import wants_compiling
from pillsnap.models.precision import autocast, this_device
from pillsnap.planner.measure import median_step


def timm_step(settings: Settings, batch: DeviceBatch, num_classes: int, seconds: float) -> float:
    """Images a second of `timm_stepper`."""
    step = timm_stepper(settings, batch, num_classes)
    for _ in range(2):
        step()
    return len(batch.images) / median_step(step, batch.images.device, seconds)


def timm_stepper(settings: Settings, batch: DeviceBatch, num_classes: int) -> Callable[[], None]:
    """A step of timm's own task, optimizer, moving average and clipping, in the order of its script."""
    import timm
    from timm.optim import create_optimizer_v2
    from timm.task import ClassificationTask
    from timm.utils import ModelEmaV3, dispatch_clip_grad

    from pillsnap.models.classifier import input_statistics, normalise

    chosen, device = settings.classification, batch.images.device
    model = timm.create_model(chosen.model, num_classes=num_classes, drop_rate=chosen.drop_rate)
    model = model.to(device, memory_format=torch.channels_last).train()
    average = ModelEmaV3(model, decay=settings.train.ema_decay, use_warmup=True)
    optimizer = create_optimizer_v2(model, "adamw", lr=chosen.lr, weight_decay=chosen.weight_decay)
    statistics_ = input_statistics(model)
    compiled = torch.compile(model) if wants_compiling(settings.train, device) else model
    task = ClassificationTask(compiled, criterion_kwargs={"smoothing": chosen.label_smoothing}, verbose=False)
    mixed = autocast(settings.train.amp, device)

    def step() -> None:
        images = normalise(batch.images, *statistics_)
        with mixed():
            loss = task(images, batch.targets["label"])["loss"]
        loss.backward()
        dispatch_clip_grad(model.parameters(), settings.train.grad_clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        average.update(model, step=1)

    return step


def ultralytics_step(settings: Settings, folder: Path, steps: int, pause: Callable[[], None] | None = None) -> float:
    """Images a second of `DetectionTrainer.train()` itself, its loader replaced by one batch.

    `pause` is called once, when the first steps have compiled what is compiled.
    """
    from pillsnap.models.detector import quiet_ultralytics

    quiet_ultralytics()
    from ultralytics.models.yolo.detect import DetectionTrainer

    chosen, device = settings.detection, this_device()
    data = _yolo_folder(folder, chosen.batch_size)
    marks: list[float] = []
    warm = max(3, steps // 4)

    def mark(_: Any) -> None:
        if device.type == "cuda" and (len(marks) in (warm, steps - 1)):
            torch.cuda.synchronize(device)
        marks.append(time.perf_counter())
        if pause is not None and len(marks) == 2:
            pause()

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
        "amp": "bf16" if device.type == "cuda" else False, "compile": wants_compiling(settings.train, device),
        "project": str(folder / "runs"), "val": True, "deterministic": False,
    }  # fmt: skip
    trainer = Trainer(overrides=overrides)
    trainer.add_callback("on_train_batch_end", mark)
    with contextlib.suppress(Done):
        trainer.train()
    return chosen.batch_size * (steps - 1 - warm) / (marks[steps - 1] - marks[warm])


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


def _yolo_folder(folder: Path, num_photos: int) -> Path:
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
