"""Measures the rates of training steps, validation steps and the loader on this machine."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
import torch

from pillsnap.config import DataSettings, TrainSettings
from pillsnap.data.loader import DeviceBatch
from pillsnap.data.stream import Stream
from pillsnap.tasks.base import Task
from pillsnap.train.step.collectives import WorkerGroup
from pillsnap.train.step.microbatch import MicrobatchRunner
from pillsnap.train.step.training_state import TrainingState

_PILLS_PER_FRAME = 3
_STEPS_PER_SYNC = 5


@dataclass(frozen=True)
class StepRates:
    """Images per second of the model alone, on one repeated batch."""

    train_images_per_s: float
    val_images_per_s: float
    peak_memory_bytes: int | None
    """Highest GPU memory; None without a GPU."""
    first_step_s: float
    """Seconds of the first step, with compilation if it is on."""

    def times(self, ratio: float) -> StepRates:
        """The rates on a GPU that is `ratio` times as fast; the first step is the host's work."""
        return replace(
            self, train_images_per_s=self.train_images_per_s * ratio, val_images_per_s=self.val_images_per_s * ratio
        )


@dataclass(frozen=True)
class LoaderRates:
    """Samples per second of a task's loader."""

    direct: float
    """From photos, with what filling the store costs, where there is one."""
    stored: float
    """From the store; without one, from photos."""


def mock_batch(task: Task, batch_size: int, device: torch.device, num_classes: int = 1) -> DeviceBatch:
    """A batch of noise in the task's shape, on the device."""
    rng = np.random.default_rng(0)
    size_px = task.settings.image_size_px
    images = torch.from_numpy(rng.integers(0, 256, (batch_size, size_px, size_px, 3), dtype=np.uint8))
    targets = {"valid": torch.ones(batch_size, dtype=torch.bool)}
    if task.name == "detection":
        corners = rng.uniform(0, 0.7 * size_px, (batch_size, _PILLS_PER_FRAME, 2))
        boxes = np.concatenate([corners, np.full_like(corners, 0.2 * size_px)], axis=2).astype(np.float32)
        targets |= {"boxes": torch.from_numpy(boxes), "num_boxes": torch.full((batch_size,), _PILLS_PER_FRAME)}
    else:
        targets["label"] = torch.from_numpy(rng.integers(0, num_classes, batch_size))
    return DeviceBatch(
        epoch=0,
        training=True,
        step=0,
        images=images.to(device),
        targets={name: tensor.to(device) for name, tensor in targets.items()},
        index=np.arange(batch_size),
        num_valid=batch_size,
    )


def measure_steps(
    task: Task,
    train: TrainSettings,
    device: torch.device,
    *,
    batch_size: int,
    seconds: float,
    num_classes: int = 1,
) -> StepRates:
    """Train and validate `task` on one batch, for about `seconds` and at least two steps each; rates of the median."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    batch = mock_batch(task, batch_size, device, num_classes)
    group = WorkerGroup(device)
    microbatches = MicrobatchRunner(task.name, batch_size, group, None, lambda message: print(message))
    state = TrainingState(task, train, device, group, microbatches, None)

    def step() -> None:
        state.step(batch, task.settings.lr, batch_size, 0)

    first_step_s = _timed(step, device)
    train_s = median_step(step, device, seconds)

    def validate() -> None:
        with torch.inference_mode(), state.autocast():
            task.validate(state.ema.module, batch)

    _timed(validate, device)
    val_s = median_step(validate, device, seconds / 2)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return StepRates(batch_size / train_s, batch_size / val_s, peak, first_step_s)


def measure_loader(stream: Stream, seconds: float, data: DataSettings, cpus_per_worker: float) -> float:
    """Samples per second after the first batch of a task's stream, decoded as for a single train worker on this node.
    Ray must be initialised.
    """
    import ray

    from pillsnap.train.data_config import with_decoders

    nodes = [ray.get_runtime_context().get_node_id()]
    dataset = with_decoders(stream, nodes, cpus_per_worker).dataset(nodes=nodes)
    batches = stream.batches(dataset, data.decoding_processes or os.cpu_count() or 1)
    with closing(batches):  # type: ignore[type-var]
        next(batches)  # includes the start of the workers
        started, samples = time.perf_counter(), 0
        for batch in batches:
            samples += int(batch["valid"].sum())
            if time.perf_counter() - started > seconds:
                break
        return samples / (time.perf_counter() - started)


def median_step(step: Callable[[], None], device: torch.device, seconds: float) -> float:
    """Median seconds per step. On a GPU several steps are launched per synchronisation, as in training."""
    count = _STEPS_PER_SYNC if device.type == "cuda" else 1

    def several() -> None:
        for _ in range(count):
            step()

    durations: list[float] = []
    started = time.perf_counter()
    while len(durations) < 2 or time.perf_counter() - started < seconds:
        durations.append(_timed(several, device) / count)
    return statistics.median(durations)


def _timed(step: Callable[[], None], device: torch.device) -> float:
    started = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
