"""The terminal monitor: tasks with curves, machines, warnings and failures, from the event log of a run."""

from __future__ import annotations

import contextlib
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from pillsnap.errors import UserError
from pillsnap.monitor.braille import draw_curve
from pillsnap.observe import telemetry
from pillsnap.observe.events import EventFollower
from pillsnap.observe.progress import format_duration, format_metrics, printable
from pillsnap.observe.run_state import RunState, TaskState

REFRESH_INTERVAL_S = 2.0
TELEMETRY_INTERVAL_S = 5.0
# Nodes are sampled every 15 s; older samples are not shown.
NODE_MAX_AGE_S = 90.0
CURVE_LINES = 3
SHOWN_MESSAGES = 4
# Minimum width for two task panels side by side.
WIDE_COLUMNS = 110

_STATUS_STYLES = {
    "met": "green",
    "finished": "green",
    "running": "cyan",
    "evaluating": "cyan",
    "missed": "red",
    "failed": "red",
}


def watch(run_dir: Path, console: Console | None = None) -> int:
    """Show the run until its verdict or Ctrl-C; without a terminal, print its current state once.

    Returns 0, or 1 when the run failed or missed its targets. UserError when there is no such directory.
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir} is not a directory: pass a run directory with --run, such as artifacts/demo")
    console = console or Console()
    state = RunState()
    follower = EventFollower(run_dir)
    _read(follower, state)
    machine = telemetry.sample(run_dir)
    if state.verdict is not None or not console.is_terminal:
        console.print(view(state, machine, console.width))
        return _exit_code(state)
    machine_time_s = time.monotonic()
    with contextlib.suppress(KeyboardInterrupt), Live(console=console, screen=True, auto_refresh=False) as live:
        while state.verdict is None:
            live.update(view(state, machine, console.width), refresh=True)
            time.sleep(REFRESH_INTERVAL_S)
            _read(follower, state)
            if time.monotonic() - machine_time_s >= TELEMETRY_INTERVAL_S:
                machine, machine_time_s = telemetry.sample(run_dir), time.monotonic()
    console.print(view(state, machine, console.width))
    return _exit_code(state)


def _read(follower: EventFollower, state: RunState) -> None:
    while events := follower.poll():
        for event in events:
            state.apply(event)


def _exit_code(state: RunState) -> int:
    return 1 if state.status in ("failed", "missed") else 0


def view(state: RunState, machine: dict[str, Any], width: int) -> RenderableType:
    """The monitor for a terminal of `width` columns; failure and verdict are above the tasks."""
    wide = width >= WIDE_COLUMNS
    panel_width = (width // 2 if wide else width) - 4
    tasks = [_task_panel(name, task, panel_width) for name, task in state.tasks.items()]
    parts: list[RenderableType] = [_header(state)]
    if state.failure is not None:
        parts.append(_failure_panel(state.failure))
    if state.verdict is not None:
        parts.append(_verdict_panel(state.verdict))
    if wide:
        row = Table.grid(expand=True)
        row.add_column(ratio=1)
        row.add_column(ratio=1)
        row.add_row(*tasks)
        parts.append(row)
    else:
        parts.extend(tasks)
    parts.append(_machine_panel(machine, "this machine"))
    parts.extend(_machine_panel(event, f"node {printable(event['node'])}") for event in other_nodes(state, machine))
    parts.extend(_message_panels(state))
    return Group(*parts)


def _header(state: RunState) -> RenderableType:
    run = state.run
    line = Text.assemble(
        (str(run.get("name", "no run")), "bold"),
        "  ",
        (state.status, f"bold {_STATUS_STYLES.get(state.status, 'yellow')}"),
    )
    details = [f"stage {run['stage']}" if isinstance(run.get("stage"), int) else ""]
    if isinstance(run.get("num_workers"), int):
        details.append(_count(run["num_workers"], "worker"))
    elif run.get("num_workers"):
        details.append(f"{run['num_workers']} workers")
    if state.evaluation is not None:
        details.append("{phase} {done:,} of {total:,}".format_map(state.evaluation))
    if state.first_time is not None and state.last_time is not None:
        details.append(f"elapsed {format_duration(state.last_time - state.first_time)}")
        ago_s = max(0.0, time.time() - state.last_time)
        last = f"{format_duration(ago_s)} ago" if ago_s < 86_400 else _date(state.last_time)
        details.append(f"last event {last}")
    line.append("  " + " · ".join(filter(None, details)), style="dim")
    return Panel(line, title="PillSnap", title_align="left")


def _task_panel(name: str, task: TaskState, width: int) -> RenderableType:
    title = f"{name} · {task.status}"
    if task.status == "skipped" or (task.status == "waiting" and not task.step):
        return Panel(Text("–", style="dim"), title=title, title_align="left")
    position = f"epoch {task.epoch}/{task.epochs or '?'}  step {task.step}/{task.total_steps or '?'}"
    if task.duration_s is not None:
        position += f"  took {format_duration(task.duration_s)}"
    elif task.status == "started" and task.eta_s is not None:
        position += f"  {format_duration(task.eta_s)} left"
    if task.restarts:
        position += f"  {_count(task.restarts, 'restart')}"
    done = round(task.progress * width)
    bar = Text.assemble(("━" * done, "green" if task.status == "finished" else "cyan"), ("─" * (width - done), "dim"))
    return Panel(Group(Text(position), bar, _metrics(task), *_curves(task, width)), title=title, title_align="left")


def _metrics(task: TaskState) -> RenderableType:
    last, best = task.last_validation, task.best_validation
    rows = [
        ("loss", "  ".join(filter(None, (_number(task.loss, ".4f"), format_metrics(task.losses))))),
        ("speed", f"{_number(task.images_per_s, '.0f')} img/s, data wait {_percent(task.data_wait_fraction)}"),
        ("lr", _number(task.lr, ".2e")),
    ]
    if task.gpu_memory_bytes is not None:
        rows.append(("GPU memory", _gib(task.gpu_memory_bytes)))
    if last is not None:
        is_best = best is not None and best["epoch"] == last["epoch"]
        rows.append(("validation", f"epoch {last['epoch']}{' (best)' * is_best}  {format_metrics(last['metrics'])}"))
        if best is not None and not is_best:
            rows.append(("best", f"epoch {best['epoch']}  {format_metrics(best['metrics'])}"))
    if task.checkpoint is not None:
        rows.append(("checkpoint", f"epoch {task.checkpoint['epoch']}, {task.checkpoint['path']}"))
    grid = Table.grid(padding=(0, 1))
    grid.add_column(style="dim", no_wrap=True, min_width=10)
    grid.add_column(overflow="ellipsis", no_wrap=True)
    for label, value in rows:
        grid.add_row(label, Text(printable(value)))
    return grid


def _curves(task: TaskState, width: int) -> list[RenderableType]:
    """The loss and the main metric of the task, side by side."""
    metrics = task.last_validation["metrics"] if task.last_validation else {}
    names = ["loss", *(f"val/{name}" for name in list(metrics)[:1])]
    drawn = [(name, task.curves[name].points()) for name in names if name in task.curves]
    drawn = [(name, points) for name, points in drawn if len(points) > 1]
    if not drawn:
        return []
    grid = Table.grid(padding=(0, 2, 0, 0))
    column_width = max(10, width // len(drawn) - 2)
    cells = []
    for name, points in drawn:
        low, high = min(y for _, y in points), max(y for _, y in points)
        label = Text(f"{name.removeprefix('val/')}  {low:.3g} to {high:.3g}", style="dim", no_wrap=True)
        lines = Text("\n".join(draw_curve(points, column_width, CURVE_LINES)), style="cyan", no_wrap=True)
        cells.append(Group(label, lines))
    grid.add_row(*cells)
    return [grid]


def other_nodes(state: RunState, machine: dict[str, Any]) -> list[dict[str, Any]]:
    """The last samples of the run's other nodes, without outdated ones."""
    recent = [event for event in state.machines.values() if time.time() - event["time"] < NODE_MAX_AGE_S]
    return sorted((event for event in recent if event["node"] != machine["node"]), key=lambda event: event["node"])


def _machine_panel(machine: dict[str, Any], title: str) -> RenderableType:
    lines = []
    for gpu in machine["gpus"]:
        power = f"{_number(gpu['power_w'], '.0f')} of {_number(gpu['power_limit_w'], '.0f')} W"
        lines.append(
            f"GPU {gpu['index']} {gpu['name']}: {_gib(gpu['memory_used_bytes'])} of {_gib(gpu['memory_total_bytes'])}, "
            f"{_percent(gpu['utilization'])} busy, {_number(gpu['temperature_c'], '.0f')} °C, {power}"
        )
    lines.append(
        f"memory {_gib(machine['host_memory_used_bytes'])} of {_gib(machine['host_memory_total_bytes'])}, "
        f"CPU {_percent(machine['cpu_fraction'])} busy, disk {_gib(machine['disk_free_bytes'])} free"
    )
    return Panel(Text(printable("\n".join(lines))), title=title, title_align="left")


def _verdict_panel(verdict: dict[str, Any]) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    for name, target in verdict["targets"].items():
        mark = Text("met", style="green") if target["met"] else Text("missed", style="red")
        table.add_row(
            Text(name), Text(_number(target["value"], ".4g")), Text(f"target {_number(target['target'], '.4g')}"), mark
        )
    title = "targets met" if verdict["met"] else "targets missed"
    report = Text(verdict["report_path"], style="dim")
    return Panel(
        Group(table, report), title=title, title_align="left", border_style="green" if verdict["met"] else "red"
    )


def _failure_panel(failure: dict[str, Any]) -> RenderableType:
    text = "\n".join(filter(None, (failure["message"], failure["cause"], failure["advice"])))
    return Panel(Text(printable(text)), title="failure", title_align="left", border_style="red")


def _message_panels(state: RunState) -> list[RenderableType]:
    panels: list[RenderableType] = []
    lines = [f"{_clock(event['time'])} {event['message']}" for event in list(state.warnings)[-SHOWN_MESSAGES:]]
    if lines:
        panels.append(
            Panel(Text(printable("\n".join(lines))), title=_count(state.num_warnings, "warning"), title_align="left")
        )
    last = list(state.last_quarantined)[-SHOWN_MESSAGES:]
    if last:
        lines = [f"{event['task']} {event['sample_id']}: {event['reason']}" for event in last]
        title = f"{_count(len(state.quarantined), 'photo')} quarantined"
        panels.append(Panel(Text(printable("\n".join(lines))), title=title, title_align="left"))
    return panels


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _percent(fraction: float | None) -> str:
    return "–" if fraction is None else f"{100 * fraction:.0f} %"


def _gib(num_bytes: float | None) -> str:
    return "–" if num_bytes is None else f"{num_bytes / (1 << 30):.1f} GiB"


def _clock(time_s: float) -> str:
    return datetime.fromtimestamp(time_s).strftime("%H:%M:%S")


def _date(time_s: float) -> str:
    return datetime.fromtimestamp(time_s).strftime("%Y-%m-%d %H:%M")


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
