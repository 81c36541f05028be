"""The report's learning curves: loss, validation metrics and learning rate of each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pillsnap.config import TASKS
from pillsnap.evaluate.report.charts import MAX_POINTS, Chart, Line, Mark, binned, line_chart
from pillsnap.evaluate.targets import percent

Events = Sequence[Mapping[str, Any]]
_METRICS = {
    "detection": (("map50", "mAP@0.5"), ("map50_95", "mAP@0.5:0.95")),
    "classification": (("top1", "top-1"), ("top5", "top-5")),
}


def of_kind(events: Events, kind: str, task: str | None = None) -> list[Mapping[str, Any]]:
    return [event for event in events if event["kind"] == kind and (task is None or event.get("task") == task)]


def learning_curves(events: Events) -> dict[str, Any] | None:
    """`charts` by task, and whether their lines have bands; None without a step or validation."""
    charts = {task: drawn for task in TASKS if (drawn := _task_charts(events, task))}
    if not charts:
        return None
    return {"charts": charts, "has_bands": max(len(of_kind(events, "step", task)) for task in TASKS) > MAX_POINTS}


def _task_charts(events: Events, task: str) -> list[Chart]:
    steps = [event for event in of_kind(events, "step", task) if event["loss"] is not None]
    validations = of_kind(events, "validation", task)
    if not steps and not validations:
        return []
    lengths = [event["steps_per_epoch"] for event in of_kind(events, "task", task) if event.get("steps_per_epoch")]
    unit = lengths[-1] if lengths else 1
    x_axis: dict[str, Any] = {
        "x_label": "epoch" if lengths else "step",
        "x_range": (0.0, max(event["step"] for event in (*steps, *validations)) / unit),
    }
    color = "blue" if task == "detection" else "orange"

    def validation_line(name: str, label: str, shade: str) -> list[Line]:
        points = [(e["step"] / unit, e["metrics"][name]) for e in validations if e["metrics"].get(name) is not None]
        return [Line(label, [x for x, _ in points], [y for _, y in points], shade, dots=True)] if points else []

    def step_line(name: str, label: str) -> list[Line]:
        points = [(e["step"] / unit, e[name]) for e in steps if e.get(name) is not None]
        return [binned([x for x, _ in points], [y for _, y in points], color, label)] if points else []

    (first, first_label), (second, second_label) = _METRICS[task]
    best = [e for e in validations if e.get("best") and e["metrics"].get(first) is not None]
    mark = None
    if best:
        value = best[-1]["metrics"][first]
        mark = Mark(best[-1]["step"] / unit, value, f"best {percent(value, 1)}", color)
    drawn = []
    if losses := step_line("loss", "training") + validation_line("loss", "validation", "grey"):
        drawn.append(line_chart(f"{task.capitalize()}: loss", losses, **x_axis))
    if lines := validation_line(first, first_label, color) + validation_line(second, second_label, "grey"):
        title = f"{task.capitalize()}: validation"
        drawn.append(line_chart(title, lines, **x_axis, y_range=(0, 1), y_percent=True, mark=mark))
    if rates := step_line("lr", "learning rate"):
        top = max(rates[0].y) or 1.0
        drawn.append(line_chart(f"{task.capitalize()}: learning rate", rates, **x_axis, y_range=(0, top)))
    return drawn
