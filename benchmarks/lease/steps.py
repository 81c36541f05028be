"""Training steps, timed. Each part compiles while others run, waits at its gate, and is timed when nothing else runs.

classification-128, classification-32, detection-yolo11m, detection-yolo11s     our step, compiled and not; of each how
                                                                                long the GPU is busy, and with what
timm-128, ultralytics-yolo11m                                                   the peers' step, compiled

cuDNN's choice of convolution algorithms, which is made by timing them, is made anew behind the gate: its memory is per
value of `allow_tf32`, which changes nothing else in bfloat16.
"""

from __future__ import annotations

import gc
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.lease.report import Gate, Report
from pillsnap.config import Settings, TrainSettings
from pillsnap.data.loader import DeviceBatch
from pillsnap.models.precision import prefer_speed, this_device
from pillsnap.planner.measure import median_step, mock_batch
from pillsnap.tasks.base import Task
from pillsnap.tasks.registry import make_task
from pillsnap.train.step.collectives import WorkerGroup
from pillsnap.train.step.device_readback import DeviceReadback
from pillsnap.train.step.microbatch import MicrobatchRunner
from pillsnap.train.step.training_state import TrainingState

NUM_CLASSES = 200
"""That of the photos which the store parts train on: another head would be another graph to compile."""
_PREPARING_STEPS = 3


def settings_of(name: str, quick: bool) -> Settings:
    """The preset's settings with the model or batch size that the part's name says."""
    from benchmarks.gpu import settings_for

    settings, (kind, which) = settings_for(quick), name.split("-")
    if kind in ("classification", "timm"):
        batch_size = int(which) if not quick else 8
        # At toy size one part compiles, so that this way is tried on a CPU as well.
        compiled = "on" if quick and name == "classification-32" else settings.train.compile
        return settings.model_copy(
            update={
                "classification": settings.classification.model_copy(update={"batch_size": batch_size}),
                "train": settings.train.model_copy(update={"compile": compiled}),
            }
        )
    model = settings.detection.model if quick else which
    return settings.model_copy(update={"detection": settings.detection.model_copy(update={"model": model})})


def timed_step(report: Report, gate: Gate, name: str, quick: bool) -> None:
    settings, kind, seconds = settings_of(name, quick), name.split("-")[0], 0.3 if quick else 4.0
    _prepare_speed()
    if kind == "timm":
        _timm(report, gate, settings, seconds)
    elif kind == "ultralytics":
        _ultralytics(report, gate, settings, 8 if quick else 60)
    else:
        _ours(report, gate, settings, kind, name, seconds)


def _prepare_speed() -> None:
    prefer_speed()
    torch.backends.cudnn.allow_tf32 = False


# --- ours -------------------------------------------------------------------------------------------------------------


def _ours(report: Report, gate: Gate, settings: Settings, kind: str, name: str, seconds: float) -> None:
    device = this_device()
    task = make_task(kind, settings, [f"K-{number:06}" for number in range(NUM_CLASSES)])
    batch = mock_batch(task, task.settings.batch_size, device, NUM_CLASSES)
    eager_settings = settings.train.model_copy(update={"compile": "off"})
    chosen = f"{task.settings.model} {task.settings.image_size_px} px batch {task.settings.batch_size}"
    # One after the other, so that the highest memory is that of one.
    eager, eager_first = _prepared(report, task, eager_settings, batch, f"{chosen} eager")
    del eager
    _free(device)
    compiled, first = _prepared(report, task, settings.train, batch, f"{chosen} compiled")
    off = {key: abs(first[key] - value) / abs(value) for key, value in eager_first.items()}
    report.line(
        f"{chosen}: first step compiled against eager{', dropout differs' if kind == 'classification' else ''}, off by "
        + ", ".join(f"{key} {value:.1e}" for key, value in off.items()), compiled_off=off,
        chosen=[task.settings.model, task.settings.image_size_px, task.settings.batch_size],
    )  # fmt: skip
    _free(device)
    gate.wait()
    prefer_speed()
    rate = _rate(compiled, task, batch, device, seconds)
    report.line(f"{chosen}: {rate:.1f} img/s compiled", compiled_images_per_s=rate)
    _profile(report, compiled, task, batch, f"{chosen} compiled", "compiled")
    val_rate = _validation_rate(compiled, task, batch, device, seconds / 4)
    report.line(f"{chosen}: {val_rate:.0f} img/s validated (not compiled)", validation_images_per_s=val_rate)
    del compiled
    _free(device)
    eager = _new_state(task, eager_settings, device, task.settings.batch_size)
    slow = _rate(eager, task, batch, device, seconds)
    report.line(f"{chosen}: {slow:.1f} img/s eager: compiling makes {rate / slow:.3f}", eager_images_per_s=slow)
    _profile(report, eager, task, batch, f"{chosen} eager", "eager")


def _new_state(task: Task, train: TrainSettings, device: torch.device, batch_size: int) -> TrainingState:
    group = WorkerGroup(device)
    return TrainingState(task, train, device, group, MicrobatchRunner(task.name, batch_size, group, None, print), None)


def _prepared(
    report: Report, task: Task, train: TrainSettings, batch: DeviceBatch, what: str
) -> tuple[TrainingState, dict[str, float]]:
    """A state after its first steps, and the first step's losses and gradient norm. Says memory, waits, graphs."""
    from torch._dynamo.utils import counters

    device, size, lr = batch.images.device, len(batch.images), task.settings.lr
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    state = _new_state(task, train, device, size)
    counters.clear()  # of what looking whether compiling works has compiled
    for note in state.notes:
        report.problem(note)
    started_s = time.perf_counter()
    step = state.step(batch, lr, size, 0)
    first = {name: float(value) for name, value in step.losses.items()} | {"norm": float(step.norm)}
    first_s = time.perf_counter() - started_s
    for number in range(1, _PREPARING_STEPS):
        state.step(batch, lr, size, number)
    waits = _waits(state, task, batch) if on_gpu else "not looked at without a GPU"
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
        state.step(batch, lr, size, _PREPARING_STEPS)
        torch.cuda.synchronize(device)
    steady = torch.cuda.max_memory_allocated(device) if on_gpu else 0
    text = f"{what}: first step {first_s:.0f} s, waits: {waits}"
    text += f", memory {steady / 2**30:.2f} GiB (at most {peak / 2**30:.2f})" if on_gpu else ""
    if what.endswith("compiled"):
        graphs, breaks = counters["stats"].get("unique_graphs", 0), sum(counters["graph_break"].values())
        hits = {name: counters["inductor"].get(f"fxgraph_cache_{name}", 0) for name in ("hit", "miss")}
        text += f", {graphs} graphs, {breaks} breaks, cache {hits['hit']} hit {hits['miss']} miss"
        wanted = train.compile == "on" or on_gpu
        if wanted and not graphs:
            report.problem(f"{what}: nothing was compiled")
    kind = "compiled" if what.endswith("compiled") else "eager"
    report.line(text, **{f"{kind}_first_step_s": first_s, f"{kind}_memory_bytes": steady, f"{kind}_peak_bytes": peak,
                         f"{kind}_first_losses": first, f"{kind}_waits": waits})  # fmt: skip
    if on_gpu and waits != "none":
        report.problem(f"{what}: a step waits for the GPU: {waits}")
    return state, first


def _waits(state: TrainingState, task: Task, batch: DeviceBatch) -> str:
    """What a step would wait for: CUDA refuses it."""
    readings = DeviceReadback[int](batch.images.device)
    try:
        torch.cuda.set_sync_debug_mode("error")
        step = state.step(batch, task.settings.lr, len(batch.images), 1)
        readings.send(torch.stack([step.bad.float(), *step.losses.values()]), 0)
    except RuntimeError as error:
        return " ".join(str(error).split())[:160]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "none"


def _rate(state: TrainingState, task: Task, batch: DeviceBatch, device: torch.device, seconds: float) -> float:
    size = len(batch.images)

    def step() -> None:
        state.step(batch, task.settings.lr, size, 0)

    for _ in range(4):
        step()
    return size / median_step(step, device, seconds)


def _profile(report: Report, state: TrainingState, task: Task, batch: DeviceBatch, what: str, kind: str) -> None:
    """How long a step keeps the GPU busy: what it would take if the host launched it fast enough."""
    from torch.profiler import ProfilerActivity, profile

    if batch.images.device.type != "cuda":
        return
    steps = 5
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            state.step(batch, task.settings.lr, len(batch.images), 0)
        torch.cuda.synchronize()
    averages = profiler.key_averages()
    kernels = sorted(
        (one for one in averages if one.self_device_time_total), key=lambda one: -one.self_device_time_total
    )
    # Ranges that only group kernels would count them twice.
    kernels = [one for one in kernels if str(one.device_type).endswith("CUDA") and not one.is_user_annotation]
    busy_ms = sum(one.self_device_time_total for one in kernels) / steps / 1000
    host = sorted(averages, key=lambda one: -one.self_cpu_time_total)[:8]
    launches = sum(one.count for one in kernels) / steps
    report.line(
        f"{what}: the GPU is busy for {busy_ms:.1f} ms a step, {launches:.0f} kernels and copies",
        **{f"{kind}_busy_ms": busy_ms, f"{kind}_launches": launches},
    )
    for one in kernels[:6]:
        report.line(f"    {one.self_device_time_total / steps / 1000:7.2f} ms {one.count // steps:5} x {one.key[:90]}")
    for one in host:
        report.line(
            f"    host {one.self_cpu_time_total / steps / 1000:7.2f} ms {one.count // steps:5} x {one.key[:80]}"
        )


def _validation_rate(
    state: TrainingState, task: Task, batch: DeviceBatch, device: torch.device, seconds: float
) -> float:
    def validate() -> None:
        with torch.inference_mode(), state.autocast():
            task.validate(state.ema.module, batch)

    validate()
    return len(batch.images) / median_step(validate, device, seconds)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# --- peers ------------------------------------------------------------------------------------------------------------


def _timm(report: Report, gate: Gate, settings: Settings, seconds: float) -> None:
    from benchmarks.steps.peers import timm_stepper

    device, batch_size = this_device(), settings.classification.batch_size
    task = make_task("classification", settings, [f"K-{number:06}" for number in range(NUM_CLASSES)])
    batch = mock_batch(task, batch_size, device, NUM_CLASSES)
    started_s = time.perf_counter()
    step = timm_stepper(settings, batch, NUM_CLASSES)
    for _ in range(_PREPARING_STEPS):
        step()
    report.line(f"timm's loop: prepared in {time.perf_counter() - started_s:.0f} s")
    _free(device)
    gate.wait()
    prefer_speed()
    for _ in range(4):
        step()
    rate = batch_size / median_step(step, device, seconds)
    report.line(f"timm's loop: {settings.classification.model} batch {batch_size}: {rate:.1f} img/s", images_per_s=rate)


def _ultralytics(report: Report, gate: Gate, settings: Settings, steps: int) -> None:
    from benchmarks.steps.peers import ultralytics_step

    def pause() -> None:
        report.line("ultralytics' trainer: prepared")
        _free(this_device())
        gate.wait()
        prefer_speed()

    with tempfile.TemporaryDirectory(prefix="pillsnap-bench-yolo-") as folder:
        rate = ultralytics_step(settings, Path(folder), steps, pause)
    chosen: Any = settings.detection
    report.line(
        f"ultralytics' trainer: {chosen.model} {chosen.image_size_px} px batch {chosen.batch_size}: {rate:.1f} img/s",
        images_per_s=rate,
    )
