"""Progress bars of a run (plain lines without a terminal), drawn from its event log by a thread of the driver."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column

from pillsnap.observe.events import EVENTS_FILE, follow_events
from pillsnap.observe.run_state import RunState, TaskState

_log = logging.getLogger(__name__)


class ProgressView:
    """Shows the progress of a run within the `with` block; an error is logged and does not affect training.

    On a terminal: one bar per task with epoch, step, loss, last validation, img/s, data wait and time left. Otherwise:
    one line per epoch and validation. Events before the block are not shown.
    """

    def __init__(self, run_dir: Path, console: Console | None = None) -> None:
        self.run_dir = run_dir
        self.console = console or Console()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def __enter__(self) -> ProgressView:
        path = self.run_dir / EVENTS_FILE
        self._offset = path.stat().st_size if path.exists() else 0
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        try:
            if self.console.is_terminal:
                self._draw_bars()
            else:
                self._print_lines()
        except (Exception, SystemExit):  # rich raises SystemExit on a broken pipe
            _log.exception("the progress view failed; training continues")

    def _print_lines(self) -> None:
        state = RunState()
        for event in follow_events(self.run_dir, self._stop, self._offset):
            state.apply(event)
            line = plain_line(event, state)
            if line:
                self.console.out(line, highlight=False)

    def _draw_bars(self) -> None:
        state = RunState()
        bars: dict[str, TaskID] = {}
        with Progress(
            TextColumn("[bold]{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=None, table_column=Column(min_width=8, ratio=1)),
            TextColumn("{task.percentage:>3.0f} %", table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[summary]}", markup=False, table_column=Column(ratio=4)),
            console=self.console,
            expand=True,
            refresh_per_second=4,
        ) as progress:
            for event in follow_events(self.run_dir, self._stop, self._offset):
                state.apply(event)
                if event["kind"] in ("warning", "failure", "budget", "decay"):
                    progress.console.out(plain_line(event, state), highlight=False)
                name = event.get("task")
                if name is None or state.tasks[name].status == "skipped":
                    continue
                if name not in bars:
                    bars[name] = progress.add_task(name, total=None, summary="")
                task = state.tasks[name]
                progress.update(bars[name], total=task.total_steps, completed=task.step, summary=task_summary(task))


def task_summary(task: TaskState) -> str:
    """One line: epoch 3/18 · loss 1.234 · map50 0.412 · 212 img/s · data wait 3 % · 1:02:03 left."""
    parts = [f"epoch {max(task.epoch, 1)}/{task.epochs or '?'}"]
    if task.total_steps:
        parts.append(f"step {task.step}/{task.total_steps}")
    if task.loss is not None:
        parts.append(f"loss {task.loss:.3f}")
    if task.last_validation is not None:
        parts.append(format_metrics(task.last_validation["metrics"], limit=1))
    if task.images_per_s is not None:
        parts.append(f"{task.images_per_s:.0f} img/s")
    if task.data_wait_fraction is not None:
        parts.append(f"data wait {100 * task.data_wait_fraction:.0f} %")
    if task.status == "finished":
        parts.append(f"done in {format_duration(task.duration_s)}" if task.duration_s else "done")
    elif task.eta_s is not None:
        parts.append(f"{format_duration(task.eta_s)} left")
    return " · ".join(part for part in parts if part)


def printable(text: str) -> str:
    """`text` with U+FFFD for each unprintable character, such as terminal escape sequences in a file name."""
    return "".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in text)


def plain_line(event: dict[str, Any], state: RunState) -> str | None:
    """An event as a line of text; None for kinds that are not shown."""
    kind = event["kind"]
    if kind == "warning":
        return printable(f"warning: {event['message']}")
    if kind == "failure":
        return printable(" ".join(filter(None, (f"failure: {event['message']}", event["cause"], event["advice"]))))
    if kind not in ("task", "epoch", "validation", "decay", "budget"):
        return None
    name, task = event["task"], state.tasks[event["task"]]
    if kind == "budget":
        return (
            f"{name}: {event['epochs_fitting']} of {event['planned_epochs']} epochs fit in the "
            f"{format_duration(event['left_s'])} left for it; the decay begins after step {event['decay_step']}"
        )
    if kind == "decay":
        return (
            f"{name}: the learning rate decays from step {event['step']} on ({event['reason']}), for "
            f"{event['num_steps']} steps, {100 * event['share']:.0f} % of all; the last epoch is {event['end_epoch']}"
        )
    if kind == "task":
        return _task_line(event, task)
    prefix = f"{name} epoch {event['epoch']}/{task.epochs or '?'}"
    if kind == "validation":
        best = " (best)" if event["best"] else ""
        return f"{prefix}  validation: {format_metrics(event['metrics'])}{best}"
    parts = [f"loss {event['loss']:.4f}" if event["loss"] is not None else "loss is not finite"]
    if event["images_per_s"] is not None:
        parts.append(f"{event['images_per_s']:.0f} img/s")
    if event["data_wait_fraction"] is not None:
        parts.append(f"data wait {100 * event['data_wait_fraction']:.0f} %")
    if event["duration_s"] is not None:
        parts.append(format_duration(event["duration_s"]))
    if task.eta_s:
        parts.append(f"{format_duration(task.eta_s)} left")
    return f"{prefix}  " + "  ".join(parts)


def _task_line(event: dict[str, Any], task: TaskState) -> str:
    if event["status"] != "started":
        duration = f" in {format_duration(event['duration_s'])}" if event["duration_s"] else ""
        return f"{event['task']} {event['status']}{duration}"
    facts = [
        f"{value:,} {unit}"
        for value, unit in (
            (task.epochs, "epochs"),
            (task.steps_per_epoch, "steps per epoch"),
            (task.num_train, "training samples"),
            (_if_not(task.samples_per_epoch, task.num_train), "of them per epoch"),
            (task.num_val, "validation samples"),
            (_if_not(task.validate_every, 1), "epochs from one validation to the next"),
        )
        if value is not None
    ]
    verb = f"resumed after epoch {event['epoch']}, step {event['step']}" if event["step"] else "started"
    return f"{event['task']} {verb}: {', '.join(facts)}"


def _if_not(value: int | None, usual: int | None) -> int | None:
    return None if value == usual else value


def format_metrics(metrics: dict[str, float | None], limit: int = 4) -> str:
    """The first `limit` metrics in the order of the task: its main metric comes first."""
    return "  ".join(
        f"{name} {'–' if value is None else f'{value:.3f}'}" for name, value in list(metrics.items())[:limit]
    )


def format_duration(duration_s: float | None) -> str:
    """41 s, 3:07 or 1:02:03; a dash for None."""
    if duration_s is None:
        return "–"
    seconds = round(duration_s)
    if seconds < 60:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
