"""The report's learning curves: loss, validation figures and learning rate of each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pillsnap.evaluate.report import charts
from pillsnap.evaluate.report.markup import Content, Markup, section, tag
from pillsnap.evaluate.targets import percent

TASKS = ("detection", "classification")
Events = Sequence[Mapping[str, Any]]
_LINES = {
    "detection": (("map50", "mAP@0.5"), ("map50_95", "mAP@0.5:0.95")),
    "classification": (("top1", "top-1"), ("top5", "top-5")),
}


def of_kind(events: Events, kind: str, task: str | None = None) -> list[Mapping[str, Any]]:
    return [event for event in events if event["kind"] == kind and (task is None or event.get("task") == task)]


def learning_curves(events: Events) -> Markup | None:
    """Loss, validation figures and learning rate of each task over its epochs."""
    parts: list[Content] = []
    for task in TASKS:
        drawn = _task_charts(events, task)
        if drawn:
            parts += [tag("h3", task.capitalize()), tag("div", drawn, class_="charts")]
    if not parts:
        return None
    intro = "Each line shows the mean of neighbouring steps, and its band their lowest and highest value."
    has_bands = max(len(of_kind(events, "step", task)) for task in TASKS) > charts.MAX_POINTS
    return section("curves", "Learning curves", tag("p", intro) if has_bands else None, *parts)


def _task_charts(events: Events, task: str) -> list[Markup]:
    steps = [event for event in of_kind(events, "step", task) if event["loss"] is not None]
    validations = of_kind(events, "validation", task)
    per_epoch = next(
        (e["steps_per_epoch"] for e in reversed(of_kind(events, "task", task)) if e.get("steps_per_epoch")), None
    )
    x_label = "epoch" if per_epoch else "step"
    at = [event["step"] / (per_epoch or 1) for event in (*steps, *validations)]
    if not at:
        return []
    x_range = (0.0, max(at))
    color = "c1" if task == "detection" else "c2"
    drawn = []

    losses = []
    if steps:
        losses.append(
            charts.binned([e["step"] / (per_epoch or 1) for e in steps], [e["loss"] for e in steps], color, "training")
        )
    if (line := _validation_line(validations, "loss", "validation", "c3", per_epoch)) is not None:
        losses.append(line)
    if losses:
        drawn.append(charts.line_chart("Loss", losses, x_label=x_label, x_range=x_range))

    first, second = _LINES[task]
    lines = [
        line
        for (name, label), shade in ((first, color), (second, "c3"))
        if (line := _validation_line(validations, name, label, shade, per_epoch)) is not None
    ]
    if lines:
        marks = []
        best = [e for e in validations if e.get("best") and e["metrics"].get(first[0]) is not None]
        if best:
            value = best[-1]["metrics"][first[0]]
            marks.append(charts.Mark(best[-1]["step"] / (per_epoch or 1), value, f"best {percent(value, 1)}", color))
        drawn.append(
            charts.line_chart(
                "Validation",
                lines,
                x_label=x_label,
                x_range=x_range,
                y_range=(0, 1),
                y_text=charts.percent_tick,
                marks=marks,
            )
        )
    rates = [event for event in steps if event.get("lr") is not None]
    if rates:
        line = charts.binned(
            [e["step"] / (per_epoch or 1) for e in rates], [e["lr"] for e in rates], color, "learning rate"
        )
        top = max(line.y)
        drawn.append(charts.line_chart("Learning rate", [line], x_label=x_label, x_range=x_range, y_range=(0, top)))
    return drawn


def _validation_line(
    validations: Events, name: str, label: str, color: str, per_epoch: int | None
) -> charts.Series | None:
    points = [
        (e["step"] / (per_epoch or 1), e["metrics"][name]) for e in validations if e["metrics"].get(name) is not None
    ]
    if not points:
        return None
    return charts.Series(label, [x for x, _ in points], [y for _, y in points], color, dots=True)
