"""State of a run, accumulated from its events; the progress bars and both monitors show it."""

from __future__ import annotations

import dataclasses
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from pillsnap.config import TASKS

# Enough points for a wide screen; bounds memory for runs of 280,000 steps.
MAX_CURVE_POINTS = 1024
MAX_MESSAGES = 20

_STEP_FIELDS = ("loss", "losses", "lr", "images_per_s", "data_wait_fraction", "gpu_memory_bytes", "eta_s")
_STEP_CURVES = ("loss", "lr", "images_per_s", "data_wait_fraction", "gpu_memory_bytes")
_TASK_FIELDS = (
    "epochs", "steps_per_epoch", "batch_size", "num_train", "num_val", "samples_per_epoch", "validate_every",
)  # fmt: skip


class Series:
    """A curve of at most `max_points` points (x, y) with increasing x; adjacent points are averaged when it is full.

    `changed_from` is the smallest x changed since the last `take_changes`, None without changes.
    """

    def __init__(self, max_points: int = MAX_CURVE_POINTS) -> None:
        assert max_points % 2 == 0
        self.max_points = max_points
        self.bucket_size = 1
        self.changed_from: float | None = None
        self._x: list[float] = []
        self._y: list[float] = []
        self._in_last_bucket = 0

    def add(self, x: float, y: float) -> None:
        """Append a point; `x` must not decrease."""
        if self._x and self._in_last_bucket < self.bucket_size:
            self._touch(self._x[-1])
            count = self._in_last_bucket
            self._y[-1] += (y - self._y[-1]) / (count + 1)
            self._x[-1] = x
            self._in_last_bucket += 1
            return
        if len(self._x) == self.max_points:
            self._y = [(a + b) / 2 for a, b in zip(self._y[::2], self._y[1::2], strict=True)]
            self._x = self._x[1::2]
            self.bucket_size *= 2
            self._touch(0)
        self._touch(x)
        self._x.append(x)
        self._y.append(y)
        self._in_last_bucket = 1

    def cut(self, x: float) -> None:
        """Remove the points after `x`."""
        while self._x and self._x[-1] > x:
            self._touch(self._x.pop())
            self._y.pop()
            self._in_last_bucket = self.bucket_size

    def points(self, start: float = 0) -> list[tuple[float, float]]:
        """The points from x = `start` on."""
        first = len(self._x)
        while first and self._x[first - 1] >= start:
            first -= 1
        return list(zip(self._x[first:], self._y[first:], strict=True))

    def take_changes(self) -> dict[str, Any] | None:
        """`points` that replace all points from x = `from` on; None without changes since the last call."""
        if self.changed_from is None:
            return None
        start, self.changed_from = self.changed_from, None
        return {"from": start, "points": self.points(start)}

    def _touch(self, x: float) -> None:
        self.changed_from = x if self.changed_from is None else min(x, self.changed_from)


@dataclass
class TaskState:
    """One task: position, latest metrics, and curves over the global step, named by metric or `val/<metric>`."""

    status: str = "waiting"
    epochs: int | None = None
    steps_per_epoch: int | None = None
    batch_size: int | None = None
    num_train: int | None = None
    num_val: int | None = None
    samples_per_epoch: int | None = None
    validate_every: int | None = None
    epoch: int = 0
    step: int = 0
    loss: float | None = None
    losses: dict[str, float | None] = field(default_factory=dict)
    lr: float | None = None
    images_per_s: float | None = None
    data_wait_fraction: float | None = None
    gpu_memory_bytes: int | None = None
    eta_s: float | None = None
    started_time: float | None = None
    last_time: float | None = None
    duration_s: float | None = None
    restarts: int = 0
    validations: list[dict[str, Any]] = field(default_factory=list, repr=False)
    checkpoint: dict[str, Any] | None = None
    examples: str | None = None
    curves: dict[str, Series] = field(default_factory=dict, repr=False)

    @property
    def last_validation(self) -> dict[str, Any] | None:
        return self.validations[-1] if self.validations else None

    @property
    def best_validation(self) -> dict[str, Any] | None:
        return next((event for event in reversed(self.validations) if event["best"]), None)

    @property
    def total_steps(self) -> int | None:
        return self.epochs * self.steps_per_epoch if self.epochs and self.steps_per_epoch else None

    @property
    def progress(self) -> float:
        """Fraction of the task's steps completed, 0 to 1."""
        if self.status in ("finished", "skipped"):
            return 1.0
        return min(1.0, self.step / self.total_steps) if self.total_steps else 0.0

    def add_to_curve(self, name: str, step: int, value: float | None) -> None:
        if value is not None:
            self.curves.setdefault(name, Series()).add(step, value)

    def view(self) -> dict[str, Any]:
        """All fields except the curves, as JSON values."""
        shown = [f.name for f in dataclasses.fields(self) if f.name not in ("curves", "validations")]
        return {
            **{name: getattr(self, name) for name in shown},
            "last_validation": self.last_validation,
            "best_validation": self.best_validation,
            "progress": self.progress,
            "total_steps": self.total_steps,
        }


class RunState:
    """State after the events passed to `apply`, oldest first. A restart discards what the task repeats.

    When another run starts in the same log, the state is reset and `generation` increases.
    """

    def __init__(self) -> None:
        self.generation = 0
        self._reset()

    def _reset(self) -> None:
        self.run: dict[str, Any] = {}
        self.tasks: dict[str, TaskState] = {task: TaskState() for task in TASKS}
        self.quarantined: set[tuple[str, str]] = set()
        self.last_quarantined: deque[dict[str, Any]] = deque(maxlen=MAX_MESSAGES)
        self.warnings: deque[dict[str, Any]] = deque(maxlen=MAX_MESSAGES)
        self.num_warnings = 0
        self.failure: dict[str, Any] | None = None
        self.verdict: dict[str, Any] | None = None
        self.evaluation: dict[str, Any] | None = None
        self.machines: dict[str, dict[str, Any]] = {}  # node -> last `system` event
        self.first_time: float | None = None
        self.last_time: float | None = None

    def apply(self, event: dict[str, Any]) -> None:
        """Apply one event; unknown kinds of newer versions are ignored."""
        self.first_time = self.first_time or event["time"]
        self.last_time = event["time"]
        handler = getattr(self, f"_apply_{event['kind']}", None)
        if handler is not None:
            handler(event)

    @property
    def status(self) -> str:
        """waiting, running, evaluating, failed, missed (targets), met or finished, by the log: a killed run remains
        running.
        """
        if self.verdict is not None:
            return "met" if self.verdict["met"] else "missed"
        if self.failure is not None:
            return "failed"
        if self.evaluation is not None:
            return "evaluating"
        states = {task.status for task in self.tasks.values()}
        if "started" in states:
            return "running"
        if states <= {"finished", "skipped"}:
            return "finished"
        return "running" if self.run else "waiting"

    def view(self) -> dict[str, Any]:
        """The state without curves, as JSON values."""
        return {
            "status": self.status,
            "run": {key: self.run.get(key) for key in ("run_id", "name", "stage", "num_workers", "manifest_hash")},
            "versions": self.run.get("versions", {}),
            "tasks": {name: task.view() for name, task in self.tasks.items()},
            "num_quarantined": len(self.quarantined),
            "quarantine": list(self.last_quarantined),
            "num_warnings": self.num_warnings,
            "warnings": list(self.warnings),
            "failure": self.failure,
            "verdict": self.verdict,
            "evaluation": self.evaluation,
            "machines": list(self.machines.values()),
            "first_time": self.first_time,
            "last_time": self.last_time,
        }

    def curves(self) -> dict[str, list[tuple[float, float]]]:
        """All curves, by `<task>/<name>`."""
        return {f"{task}/{name}": s.points() for task, state in self.tasks.items() for name, s in state.curves.items()}

    def take_curve_changes(self) -> dict[str, dict[str, Any]]:
        """`Series.take_changes` of every curve that changed since the last call."""
        changes = {}
        for task, state in self.tasks.items():
            for name, series in state.curves.items():
                change = series.take_changes()
                if change is not None:
                    changes[f"{task}/{name}"] = change
        return changes

    def _apply_run(self, event: dict[str, Any]) -> None:
        if self.run and self.run["run_id"] != event["run_id"]:  # a new run in the same directory
            self.generation += 1
            self._reset()
            self.first_time = self.last_time = event["time"]
        self.run = event
        self.failure = None  # the run was resumed
        self.verdict = self.evaluation = None

    def _apply_task(self, event: dict[str, Any]) -> None:
        task = self.tasks[event["task"]]
        task.last_time = event["time"]
        for name in _TASK_FIELDS:
            if event.get(name) is not None:  # logs of older versions lack some
                setattr(task, name, event[name])
        if event["status"] == "started":
            task.restarts += task.started_time is not None
            task.started_time = task.started_time or event["time"]
            task.epoch, task.step = event["epoch"], event["step"]
            self.failure = None
            task.validations = [v for v in task.validations if v["epoch"] <= event["epoch"]]
            for series in task.curves.values():
                series.cut(event["step"])
        if event["status"] == "finished":
            task.eta_s = 0.0
            task.duration_s = event["duration_s"]
        task.status = event["status"]

    def _apply_step(self, event: dict[str, Any]) -> None:
        task = self._at_position(event)
        for name in _STEP_FIELDS:
            setattr(task, name, event[name])
        for name in _STEP_CURVES:
            task.add_to_curve(name, event["step"], event[name])

    def _apply_epoch(self, event: dict[str, Any]) -> None:
        task = self._at_position(event)
        task.add_to_curve("epoch_loss", event["step"], event["loss"])

    def _apply_validation(self, event: dict[str, Any]) -> None:
        task = self._at_position(event)
        task.validations.append(event)
        for name, value in event["metrics"].items():
            task.add_to_curve(f"val/{name}", event["step"], value)

    def _apply_checkpoint(self, event: dict[str, Any]) -> None:
        self.tasks[event["task"]].checkpoint = event

    def _apply_decay(self, event: dict[str, Any]) -> None:
        self.tasks[event["task"]].epochs = event["end_epoch"]

    def _apply_examples(self, event: dict[str, Any]) -> None:
        self.tasks[event["task"]].examples = event["path"]

    def _apply_system(self, event: dict[str, Any]) -> None:
        self.machines[event["node"]] = event

    def _apply_quarantine(self, event: dict[str, Any]) -> None:
        # The photo is read again in every epoch and after a restart.
        key = (event["task"], event["sample_id"])
        if key not in self.quarantined:
            self.quarantined.add(key)
            self.last_quarantined.append(event)

    def _apply_warning(self, event: dict[str, Any]) -> None:
        self.num_warnings += 1
        self.warnings.append(event)

    def _apply_failure(self, event: dict[str, Any]) -> None:
        self.failure, self.evaluation = event, None
        for task in self.tasks.values():
            if task.status == "started":
                task.status = "failed"  # until it restarts

    def _apply_evaluation(self, event: dict[str, Any]) -> None:
        self.evaluation = event

    def _apply_verdict(self, event: dict[str, Any]) -> None:
        self.verdict, self.evaluation = event, None

    def _at_position(self, event: dict[str, Any]) -> TaskState:
        task = self.tasks[event["task"]]
        task.epoch, task.step, task.last_time = event["epoch"], event["step"], event["time"]
        return task
