"""Shared by the reliability tests: tiny runs, training without Ray, injected faults, result lines."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from pillsnap.config import Settings, load_settings
from pillsnap.data.loader import DeviceBatch, Loader
from pillsnap.data.recipes import Batch
from pillsnap.data.sources import Source
from pillsnap.manifest.table import read_classes, read_manifest
from pillsnap.observe.events import EventLog, read_events
from pillsnap.photos.reader import PhotoReader
from pillsnap.runs.backend import LocalBackend
from pillsnap.runs.checkpoint import Checkpoint, Position, find_checkpoint
from pillsnap.tasks.registry import make_task
from pillsnap.train.job import Job
from pillsnap.train.loop import train
from pillsnap.train.schedule.epochs import stream_plan
from pillsnap.train.schedule.time_budget import TimeBudget
from tests.processes import titled

TINY = {
    "detection.image_size_px": 64,
    "detection.epochs": 3,
    "detection.mosaic_off_epochs": 1,
    "detection.batch_size": 4,
    "classification.image_size_px": 32,
    "classification.epochs": 3,
    "classification.batch_size": 8,
    "train.log_every_steps": 1,
    "train.cpus_per_worker": 0.25,
    "data.decoding_cpus": 0.5,
    "wandb.mode": "disabled",
}
# Without batch normalisation, a step does not depend on how its batch is split.
NO_BATCH_NORM = {
    "classification.model": "test_vit",
    "classification.image_size_px": 160,
    "classification.batch_size": 8,
}
FAULTS_FILE = "faults.json"


def tiny(**overrides: Any) -> Settings:
    """Settings of the smallest run; `train__task="detection"` sets train.task."""
    return load_settings("demo", TINY | {key.replace("__", "."): value for key, value in overrides.items()})


def say(passed: int, of: int, what: str) -> None:
    """Print and check a test's result line, bypassing pytest's capture."""
    line = f"PASS {passed}/{of} {what}" if passed == of else f"FAIL {passed}/{of} {what}"
    os.write(2, f"\n{line}\n".encode())
    path = os.environ.get("PILLSNAP_RELIABILITY_LINES")
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    assert passed == of, line


class StoppableBackend(LocalBackend):
    """A run in a folder whose stop requests come from a function instead of a file."""

    def __init__(self, run_dir: Path, task: str, stop_requested: Callable[[], bool]) -> None:
        super().__init__(run_dir, task)
        self.stop_requested = stop_requested  # type: ignore[method-assign]


class LoopRun:
    """Trains one task with the real loop, state and checkpoints; batches are made in this process instead of by Ray.

    With `rank` and `num_workers` it is one of several workers, whose process group is initialised.
    """

    def __init__(
        self,
        run_dir: Path,
        name: str,
        settings: Settings,
        manifest: Path,
        root: Path,
        rank: int = 0,
        num_workers: int = 1,
    ) -> None:
        torch.set_num_threads(1)  # models this small gain nothing from more
        self.run_dir, self.name, self.settings, self.rank = run_dir, name, settings, rank
        classes = read_classes(manifest.parent)
        self.codes = [entry.code for entry in classes]
        self.task = make_task(name, settings, self.codes)
        self.samples = self.task.samples(read_manifest(manifest), None)
        self.plan = stream_plan(getattr(settings, name), settings.train.seed, self.samples, num_workers)
        self.source = Source(PhotoReader(str(root), settings.data.max_pixels))
        self.trained_ids: list[tuple[int, int, list[int]]] = []

    @property
    def folder(self) -> Path:
        return self.run_dir / "checkpoints" / self.name

    def last(self) -> Checkpoint | None:
        return find_checkpoint(self.folder)[0]

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in read_events(self.run_dir) if event["kind"] == kind]

    def train(self, stop_at: Callable[[int], bool] | None = None) -> Position:
        """Continue from the last checkpoint; `stop_at(steps since then)` requests a stop."""
        resume = self.last()
        position = resume.position if resume else Position()
        batches = self._batches(position)
        polled = {"times": 0}

        def stop_requested() -> bool:
            polled["times"] += 1
            return bool(stop_at and stop_at(polled["times"]))

        events = EventLog(self.run_dir) if self.rank == 0 else None
        if events is not None:
            events.write("task", task=self.name, status="started", epoch=position.epoch, step=position.global_step)
        job = Job(
            task=self.task, plan=self.plan, train=self.settings.train, data=self.settings.data,
            device=torch.device("cpu"), backend=StoppableBackend(self.run_dir, self.name, stop_requested),
            meta={"task": self.name, "config": self.settings.model_dump(mode="json"), "codes": self.codes,
                  "manifest_hash": "0" * 64},
            resume=resume, elapsed_before_s=resume.meta["elapsed_s"] if resume else 0.0, events=events,
            sample_ids=lambda numbers: self.samples.train["sample_id"].take(numbers).to_pylist(),
            preempted=lambda: False, report=lambda metrics: None, budget=self._budget(),
        )  # fmt: skip
        try:
            return train(job, batches)
        finally:
            if events is not None:
                events.close()

    def _budget(self) -> TimeBudget | None:
        minutes = self.settings.train.time_budget_minutes
        return None if minutes is None else TimeBudget(60 * minutes, 0.0, 1.0, self.plan.num_val)

    def _batches(self, position: Position) -> Iterator[DeviceBatch]:
        recipe = self.task.recipe(self.samples)

        def batches() -> Iterator[Batch]:
            first = self.plan.first_slot(position.epoch, position.epoch_step) + self.rank
            for number in range(first, self.plan.num_slots, self.plan.num_workers):
                slot = self.plan.slot(number)
                samples = self.samples.train if slot.training else self.samples.val
                batch = recipe.make(samples, slot, self.plan.seed, self.plan.worker_batch_size, self.source)
                if slot.training:
                    self.trained_ids.append((slot.epoch, slot.step, [int(i) for i in slot.members]))
                yield batch | slot.position()

        return Loader(batches(), torch.device("cpu"))


def same_state(first: Checkpoint, second: Checkpoint) -> list[str]:
    """Names of all bitwise differences between two checkpoints: weights, average, optimizer, random state, progress."""
    different = [] if first.position == second.position else ["position"]
    for which in ("model", "ema"):
        one, other = first.weights(which), second.weights(which)
        different += [f"{which} {name}" for name in one if not torch.equal(one[name], other[name])]
    different += _differences("trainer", first.trainer_state(), second.trainer_state())
    return different


def _differences(where: str, one: Any, other: Any) -> list[str]:
    if isinstance(one, torch.Tensor):
        return [] if torch.equal(one, other) else [where]
    if isinstance(one, dict):
        keys = {*one, *other}
        return [text for key in keys for text in _differences(f"{where} {key}", one.get(key), other.get(key))]
    if isinstance(one, list | tuple):
        return [
            text
            for number, pair in enumerate(zip(one, other, strict=True))
            for text in _differences(f"{where} {number}", *pair)
        ]
    return [] if one == other else [f"{where}: {one!r}, {other!r}"]


def inject(faults: dict[str, Any], rank: int) -> None:
    """Make this process fail as `faults` describe.

    {"oom_above_rows": n, "oom_rank": r}, {"nan_steps": [first, last], "nan_rank": r}, {"hang_step": k, "hang_rank": r,
    "hang_once": file written before hanging}, {"record_ids": folder}, {"step_pause_s": seconds added to each step},
    {"threads": torch threads, overriding the worker's}; of `train_two` also {"stop_at_poll": number of the request}.
    """
    from pillsnap.train.step import training_state

    if "threads" in faults:
        torch.set_num_threads(faults["threads"])
        torch.set_num_threads = lambda number: None  # type: ignore[assignment]
    losses, step = training_state._Losses.forward, training_state.TrainingState.step
    now = {"step": 0}

    def faulty_step(self: Any, batch: Any, lr: float, samples: int, global_step: int) -> Any:
        now["step"] = global_step + 1
        if "record_ids" in faults:
            line = {
                "task": self._task.name, "host": socket.gethostname(), "step": global_step + 1,
                "ids": [int(i) for i in batch.index if i >= 0],
            }  # fmt: skip
            with open(Path(faults["record_ids"]) / f"ids-{rank}.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
        time.sleep(faults.get("step_pause_s", 0.0))
        if global_step + 1 == faults.get("hang_step") and rank == faults["hang_rank"]:
            marker = Path(faults["hang_once"])
            if not marker.exists():
                marker.write_text(str(time.time()))
                time.sleep(10**6)
        return step(self, batch, lr, samples, global_step)

    def faulty_losses(self: Any, batch: DeviceBatch) -> dict[str, torch.Tensor]:
        if rank == faults.get("oom_rank", rank) and len(batch.images) > faults.get("oom_above_rows", 10**9):
            torch.randn(3)  # the failed attempt consumes random numbers
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        found = losses(self, batch)
        first, last = faults.get("nan_steps", (0, 0))
        if first <= now["step"] <= last and rank == faults.get("nan_rank", rank):
            found = {name: loss * float("nan") for name, loss in found.items()}
        return found

    training_state.TrainingState.step = faulty_step  # type: ignore[method-assign, assignment]
    training_state._Losses.forward = faulty_losses  # type: ignore[method-assign]


def worker_with_faults(config: Any) -> None:
    """Replaces run_worker: fails as RUN/faults.json or the file in PILLSNAP_FAULTS describes."""
    from ray import train as ray_train

    from pillsnap.train.worker import run_worker

    path = Path(os.environ.get("PILLSNAP_FAULTS") or Path(config.run_dir) / FAULTS_FILE)
    inject(json.loads(path.read_text()) if path.exists() else {}, ray_train.get_context().get_world_rank())
    run_worker(config)


def train_workers() -> list[Any]:
    """Ray's train workers among the descendants of this process."""
    return titled("TrainWorker")


def raw_events(run_dir: Path, kind: str = "") -> list[dict[str, Any]]:
    """All lines of the event log, including events that a restart repeated."""
    path = run_dir / "events.jsonl"
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    events = [json.loads(line) for line in lines[:-1]]
    return [event for event in events if not kind or event["kind"] == kind]


def wait_for(condition: Callable[[], Any], timeout_s: float, what: str) -> Any:
    """Poll until `condition` is true; returns its value."""
    give_up_s = time.monotonic() + timeout_s
    while time.monotonic() < give_up_s:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError(f"no {what} within {timeout_s:.0f} s")


def group_of_two(
    rank: int, port: int, run_dir: str, name: str, settings: dict, manifest: str, root: str, faults: dict
) -> None:
    """One of two training processes over gloo; writes its outcome to `run_dir`/end-<rank>.json."""
    import torch.distributed as dist

    from pillsnap.config import settings_from_dict

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    inject(faults, rank)
    loop = LoopRun(Path(run_dir), name, settings_from_dict(settings), Path(manifest), Path(root), rank, 2)
    end: dict[str, Any] = {"error": ""}
    stop = faults.get("stop_at_poll")
    try:
        loop.train(stop_at=(lambda polls: polls == stop) if stop else None)
    except Exception as error:
        end["error"] = f"{type(error).__name__}: {error}"
    (Path(run_dir) / f"end-{rank}.json").write_text(json.dumps(end | {"ids": loop.trained_ids}))
    dist.destroy_process_group()


def train_two(
    run_dir: Path, name: str, settings: Settings, manifest: Path, root: Path, faults: dict[str, Any]
) -> list[dict]:
    """Train with two processes; returns the outcome of each."""
    from torch import multiprocessing

    run_dir.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (port, str(run_dir), name, settings.model_dump(mode="json"), str(manifest), str(root), faults)
    multiprocessing.spawn(group_of_two, arguments, nprocs=2)
    return [json.loads((run_dir / f"end-{rank}.json").read_text()) for rank in range(2)]
