"""run_worker with Ray's context and the run's backend replaced: order of the start, the Job, and failures."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pillsnap.config import Settings, load_settings
from pillsnap.data.plan import StreamPlan
from pillsnap.errors import UserError
from pillsnap.runs.checkpoint import Checkpoint
from pillsnap.train import worker
from pillsnap.train.job import Job
from pillsnap.train.schedule.time_budget import TimeBudget
from pillsnap.train.worker import WorkerConfig, run_worker

POSITION = {"epoch": 1, "epoch_step": 2, "global_step": 12}


@dataclass(frozen=True)
class FakeStream:
    plan: StreamPlan
    train_samples: Any = None

    def batches(self, share: object, num_processes: int) -> Iterator[Any]:
        return iter(())


class Worker:
    """Runs run_worker as one rank of two, and records what it calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, run_dir: Path, rank: int) -> None:
        self.calls: list[str] = []
        self.events: list[dict[str, Any]] = []
        self.connected: tuple[Any, ...] = ()
        self.job: Job | None = None
        self.meta: dict[str, Any] = {}
        self.run_dir = run_dir
        self.send_log = None
        self.train: Callable[[], None] = lambda: None
        context = SimpleNamespace(get_world_rank=lambda: rank, get_local_world_size=lambda: 2, get_world_size=lambda: 2)
        monkeypatch.setattr("ray.train.get_context", lambda: context)
        monkeypatch.setattr("ray.train.torch.get_device", lambda: torch.device("cpu"))
        monkeypatch.setattr("ray.train.get_dataset_shard", lambda name: self.calls.append(f"shard {name}"))
        monkeypatch.setattr("pillsnap.observe.logs.setup_logging", lambda *_, **__: None)
        monkeypatch.setattr("pillsnap.runs.backend.connect", self._connect)
        monkeypatch.setattr("pillsnap.train.loop.train", self._train)
        monkeypatch.setattr(worker, "_tune", lambda device, cores: None)

    def run(self, settings: Settings | None = None, **changes: Any) -> None:
        plan: Any = FakeStream(StreamPlan(seed=0, epochs=3, num_train=20, num_val=4, batch_size=4, num_workers=1))
        config = WorkerConfig(
            task="classification", settings=settings or load_settings("demo"), codes=["K-1"], run_dir=str(self.run_dir),
            meta={"run_id": "demo-1"}, stream=plan, started_at_s=0.0, elapsed_before_s=5.0, **changes,
        )  # fmt: skip
        run_worker(config)

    def _connect(self, *arguments: Any, **options: Any) -> Worker:
        self.connected = (*arguments, options)
        return self

    def _train(self, job: Job, batches: Any) -> None:
        self.calls.append("train")
        self.job = job
        self.train()

    # The backend.

    @contextmanager
    def become_writer(self) -> Iterator[Worker]:
        self.calls.append("become writer")
        yield self
        self.calls.append("release")

    def last_checkpoint(self) -> tuple[Checkpoint, list[str]]:
        self.calls.append("last checkpoint")
        return Checkpoint(self.run_dir, {"position": POSITION, **self.meta}), ["step-00000013 is damaged."]

    def write(self, kind: str, **fields: Any) -> None:
        self.events.append({"kind": kind, **fields})


def test_rank_0_becomes_the_writer_before_the_stream_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Otherwise a worker of an earlier start could add a checkpoint after the stream has chosen its position."""
    first = Worker(monkeypatch, tmp_path, rank=0)
    first.run()
    assert first.calls == ["become writer", "shard stream", "last checkpoint", "train", "release"]
    warning, started = first.events
    assert warning["message"] == "step-00000013 is damaged. The newest sound checkpoint is used instead."
    assert (started["status"], started["epoch"], started["step"]) == ("started", 1, 12)
    assert (started["steps_per_epoch"], started["num_train"], started["num_val"]) == (5, 20, 4)
    job = first.job
    assert job is not None and job.events is first and job.backend is first
    assert job.plan.num_workers == job.meta["num_workers"] == 2
    assert job.meta["run_id"] == "demo-1" and job.task.name == "classification"
    assert job.elapsed_before_s > 5.0
    assert first.connected == (str(tmp_path), "", None, {"task": "classification", "rank": 0})


def test_start_within_an_early_decay_names_its_last_epoch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = Worker(monkeypatch, tmp_path, rank=0)
    for first_step, epochs in ((12, 3), (11, 2)):  # a decay that has not begun may still be dropped
        first.meta = {"schedule": {"reason": "budget", "first_step": first_step, "end_epoch": 2}}
        first.run(budget=TimeBudget(60.0, 0.0, 1.0, 4))
        assert first.events[-1]["epochs"] == epochs
        assert first.job is not None and first.job.budget == TimeBudget(60.0, 0.0, 1.0, 4)


def test_other_ranks_write_no_events(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    second = Worker(monkeypatch, tmp_path, rank=1)
    second.run(uri="s3://bucket/run", relay="relay")
    assert second.calls == ["shard stream", "last checkpoint", "train"]
    assert second.events == [] and second.job is not None and second.job.events is None
    assert second.connected == (str(tmp_path), "s3://bucket/run", "relay", {"task": "classification", "rank": 1})


def test_weights_that_the_checkpoint_replaces_are_not_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    second = Worker(monkeypatch, tmp_path, rank=1)
    second.run(load_settings("demo", {"classification.weights": str(tmp_path / "deleted.safetensors")}))
    assert second.job is not None
    second.job.task.build()


def test_user_error_is_an_event_and_no_restart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = Worker(monkeypatch, tmp_path, rank=0)

    def fail() -> None:
        raise UserError("Lower classification.lr.")

    first.train = fail
    first.run()
    assert first.events[-1] == {"kind": "failure", "message": "Lower classification.lr."}


@pytest.mark.parametrize("rank", [0, 1])
def test_other_errors_are_raised_with_a_warning(
    rank: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = Worker(monkeypatch, tmp_path, rank)

    def fail() -> None:
        raise RuntimeError("CUDA error:\nunspecified launch failure")

    one.train = fail
    with caplog.at_level(logging.ERROR), pytest.raises(RuntimeError, match="launch failure"):
        one.run()
    assert "this worker stops" in caplog.text
    messages = [event["message"] for event in one.events if event["kind"] == "warning"]
    expected = (
        "classification: the worker stopped (RuntimeError: CUDA error: unspecified launch failure); train.log has"
    )
    assert [expected in message for message in messages] == ([False, True] if rank == 0 else [])
