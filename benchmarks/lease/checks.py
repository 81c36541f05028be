"""Parts that check behaviour on the GPU and time nothing: they may run beside others.

loader      does every batch arrive whole that the loader's thread copies on a side stream
gpu-tests   the tests marked `gpu`, and whether torch.compile works here at all
memory      does a step whose batch does not fit give the result of the unsplit step
"""

from __future__ import annotations

import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.lease.report import Report
from pillsnap.data.loader import DeviceBatch, Loader
from pillsnap.data.recipes import STAGES, Batch
from pillsnap.models.precision import this_device

ROOT = Path(__file__).resolve().parents[2]

# --- loader -----------------------------------------------------------------------------------------------------------


class _Source:
    """Batches in a ring of two buffers that are overwritten as soon as the next batch is asked for, with random delays.

    `expected` has, by step, the checksum of each batch: computed here, before the loader sees it.
    """

    def __init__(self, steps: int, size_px: int, rows: int, fail_at: int | None = None) -> None:
        self.expected: list[tuple[int, int]] = []
        self._steps, self._size_px, self._rows, self._fail_at = steps, size_px, rows, fail_at
        self._random = random.Random(1)
        rng = np.random.default_rng(0)
        shape = (rows, size_px, size_px, 3)
        self._bases = [rng.integers(0, 256, shape, dtype=np.uint8) for _ in range(6)]
        self._ring = [np.empty(shape, np.uint8) for _ in range(2)]

    def __iter__(self) -> Iterator[Batch]:
        for step in range(self._steps):
            if step == self._fail_at:
                raise ValueError("injected into the source")
            if self._random.random() < 0.3:
                time.sleep(self._random.uniform(0, 0.02))
            # Every fifth batch is smaller, so that the allocators hand out other blocks than the last time.
            rows = self._rows if step % 5 else max(1, self._rows // 2)
            image = self._ring[step % 2][:rows]
            np.add(self._bases[step % len(self._bases)][:rows], np.uint8(step % 251), out=image)
            label = np.arange(rows, dtype=np.int64) * (step + 1)
            words = image.reshape(-1).view(np.int64)
            self.expected.append((int((words * _weights(len(words))).sum()), int(label.sum())))
            yield {
                "image": image, "label": label, "valid": np.ones(rows, bool), "index": np.arange(rows),
                "epoch": np.array(0), "training": np.array(True), "step": np.array(step), "quarantine": np.array("[]"),
                "stage_s": np.zeros(len(STAGES)),
            }  # fmt: skip


def _weights(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.int64) * 2 + 1  # products and sums wrap in the same way on both sides


class _Careless(Loader):
    """The negative control: hands a batch over without making the consumer's stream wait for the copy."""

    def __next__(self) -> DeviceBatch:
        assert self._thread is not None and self._next is not None
        batch = self._next.result()
        self._next = self._thread.submit(self._load)
        return batch


def loader(report: Report, quick: bool) -> None:
    """500 batches, their checksums on both sides, random delays on both sides; then early close and an exception."""
    device = this_device()
    steps, size_px, rows = (40, 32, 8) if quick else (500, 224, 64)
    source = _Source(steps, size_px, rows)
    started_s = time.perf_counter()
    with closing(Loader(source, device, ahead=True)) as batches:
        wrong = _wrong(_consume(batches, device), source)
    report.check(
        wrong == 0 and len(source.expected) == steps,
        f"{len(source.expected)} batches of {rows}x{size_px}x{size_px}x3 on {device}: {wrong} with a wrong checksum "
        f"({time.perf_counter() - started_s:.0f} s)",
    )
    source = _Source(steps // 5, size_px, rows)
    with torch.inference_mode(), closing(Loader(source, device, ahead=True)) as batches:
        sums = _consume(batches, device)
    report.check(_wrong(sums, source) == 0, f"the same from a consumer in inference mode, {len(sums)} batches")
    if device.type == "cuda":
        source = _Source(steps // 5, size_px, rows)
        with closing(_Careless(source, device, ahead=True)) as batches:
            wrong = _wrong(_consume(batches, device), source)
        report.line(f"negative control, no wait for the copy's stream: {wrong} of {steps // 5} batches wrong")

    source = _Source(steps, size_px, rows)
    batches = Loader(source, device, ahead=True)
    sums = [_checksum(next(batches), device) for _ in range(10)]
    batches.close()
    assert batches._thread is not None
    batches._thread.shutdown(wait=True)
    made = len(source.expected)
    _synchronize(device)
    report.check(_wrong(sums, source) == 0 and made <= 12, f"closed after 10 batches: the source made {made}")

    source, sums, error = _Source(steps, size_px, rows, fail_at=steps // 2), [], ""
    with closing(Loader(source, device, ahead=True)) as batches:
        try:
            for batch in batches:
                sums.append(_checksum(batch, device))
        except ValueError as reached:
            error = str(reached)
    report.check(
        "injected" in error and len(sums) == steps // 2 and _wrong(sums, source) == 0,
        f"an exception at batch {steps // 2} reached the consumer after {len(sums)} sound batches ({error!r})",
    )


def _consume(batches: Loader, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Checksums on the device, read later. Work is queued before each, so that the device reads a batch long after the
    host has dropped it and the loader's thread asks for memory again.
    """
    work = torch.randn(4096 if device.type == "cuda" else 64, 4096 if device.type == "cuda" else 64, device=device)
    delays, sums = random.Random(2), []
    kept: list[DeviceBatch] = []
    for batch in batches:
        for _ in range(delays.choice((0, 0, 1, 4))):
            work = (work @ work).clamp_(-1, 1)
        sums.append(_checksum(batch, device))
        if delays.random() < 0.1:
            kept = [*kept[-2:], batch]
        if delays.random() < 0.2:
            time.sleep(delays.uniform(0, 0.02))
    _synchronize(device)
    return sums


def _checksum(batch: DeviceBatch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    assert batch.images.device == device
    words = batch.images.flatten().view(torch.int64)
    weights = torch.arange(len(words), device=device, dtype=torch.int64) * 2 + 1
    return (words * weights).sum(), batch.targets["label"].sum()


def _wrong(sums: list[tuple[torch.Tensor, torch.Tensor]], source: _Source) -> int:
    pairs = zip(sums, source.expected, strict=False)
    return sum((int(pixels), int(labels)) != expected for (pixels, labels), expected in pairs)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- gpu-tests --------------------------------------------------------------------------------------------------------


def gpu_tests(report: Report, quick: bool) -> None:
    """`pytest -m gpu` on the files that hold such tests; on a CPU they are skipped."""
    from pillsnap.models.compiling import compile_problem

    report.line(f"torch.compile of a small function: {compile_problem(this_device()) or 'works'}")
    files = [str(path) for path in (ROOT / "tests" / "unit").rglob("test_*.py") if "mark.gpu" in path.read_text()]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "--no-header", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout[-20000:], done.stderr[-5000:])
    lines = done.stdout.strip().splitlines() or [done.stderr.strip()[-300:]]
    for failed in [line for line in lines if re.match(r"(FAILED|ERROR)", line)][:8]:
        report.line(failed[:240])
    report.check(done.returncode == 0, f"pytest -m gpu: {lines[-1]}")


# --- memory -----------------------------------------------------------------------------------------------------------


def memory(report: Report, quick: bool) -> None:
    """A step of each kind of model with and without a cap on GPU memory that the whole batch does not fit into."""
    # Without batch normalisation the split step has to equal the unsplit one within rounding; with it, nearly.
    cases = [
        ("classification", "vit_tiny_patch16_224", 224, 256, "off", 1e-4, True),
        ("classification", "tf_efficientnetv2_s", 224, 128, "auto", 1e-1, False),
        ("detection", "yolo11s", 640, 16, "auto", 0.5, False),
    ]
    if quick:
        cases = [
            ("classification", "vit_tiny_patch16_224", 224, 8, "off", 1e-4, True),
            ("detection", "yolo11n", 128, 8, "off", 0.5, False),
        ]
    for case in cases:
        try:
            _split_step(report, *case)
        except Exception as error:
            report.problem(f"{case[1]}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")


def _split_step(
    report: Report, name: str, model: str, size_px: int, batch_size: int, amp: str, tolerance: float, exact: bool
) -> None:
    from benchmarks.gpu import settings_for
    from pillsnap.models.precision import prefer_speed
    from pillsnap.planner.measure import mock_batch
    from pillsnap.tasks.registry import make_task
    from pillsnap.train.step.collectives import WorkerGroup
    from pillsnap.train.step.microbatch import MicrobatchRunner
    from pillsnap.train.step.training_state import TrainingState

    prefer_speed()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not exact
    settings = settings_for(quick=False)
    changes: dict[str, Any] = {"model": model, "image_size_px": size_px, "batch_size": batch_size}
    if name == "classification":
        changes["drop_rate"] = 0.0  # whose random numbers are drawn for each part anew
    train = settings.train.model_copy(update={"amp": amp, "compile": "off"})
    chosen = getattr(settings, name).model_copy(update=changes)
    settings = settings.model_copy(update={name: chosen, "train": train})
    task, device = make_task(name, settings, [f"K-{number:06}" for number in range(100)]), this_device()
    batch = mock_batch(task, batch_size, device, 100)
    said: list[str] = []

    on_gpu = device.type == "cuda"

    def one_step(fraction: float | None) -> tuple[dict[str, float], int, int]:
        group = WorkerGroup(device)
        micro = MicrobatchRunner(name, batch_size, group, None, said.append)
        state = TrainingState(task, settings.train, device, group, micro, None)
        if on_gpu:
            torch.cuda.empty_cache()
            held = torch.cuda.memory_reserved(device)
            if fraction is not None:
                cap = held + fraction * (need - held)
                torch.cuda.set_per_process_memory_fraction(cap / torch.cuda.mem_get_info(device)[1], device)
        elif fraction is not None:
            micro.size = batch_size // 2  # no GPU: the split alone, without the fault that makes it
        step = state.step(batch, task.settings.lr, batch_size, 0)
        losses = {key: float(value) for key, value in step.losses.items()} | {"gradient norm": float(step.norm)}
        assert not bool(step.bad)
        peak = 0
        if on_gpu:  # of a second step: cuDNN tries algorithms in the first one, some of which take much memory
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            state.step(batch, task.settings.lr, batch_size, 1)
            peak = torch.cuda.max_memory_allocated(device)
        return losses, micro.size, peak

    need = 0
    whole, whole_size, need = one_step(None)
    if on_gpu:
        torch.cuda.empty_cache()
    try:
        split, split_size, peak = one_step(0.45)
    finally:
        if on_gpu:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
            torch.cuda.empty_cache()
    off = {key: abs(split[key] - whole[key]) / abs(whole[key]) for key in whole}
    where = f"{need / 2**30:.2f} -> {peak / 2**30:.2f} GiB" if on_gpu else "no GPU"
    # A detector's loss is also divided by the scores of its part, as ultralytics divides by those of its batch.
    kind = "equal within rounding" if exact else "losses alone; batch normalisation sees each part"
    compared = off.values() if exact else [value for key, value in off.items() if key != "gradient norm"]
    report.check(
        split_size < batch_size == whole_size and max(compared) < tolerance,
        f"{model} batch {batch_size} in parts of {split_size} ({where}), off by "
        + ", ".join(f"{key} {value:.1e}" for key, value in off.items()) + f" (< {tolerance}; {kind})",
    )  # fmt: skip
    report.check(bool(said) or not on_gpu, f"{model}: said {len(said)} times that the batch was split")
