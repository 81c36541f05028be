"""Targets of a run, the verdict on them, and the verdict as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pillsnap.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Kind:
    """What a target name stands for: where its value is in the metrics, and which side of the target is good."""

    label: str
    task: str | None
    at_least: bool
    is_fraction: bool

    def text(self, value: float | None) -> str:
        """The value as people read it."""
        if value is None:
            return "–"
        return percent(value) if self.is_fraction else duration(value)


KINDS = {
    "top1": Kind("Classification top-1", "classification", at_least=True, is_fraction=True),
    "map50": Kind("Detection mAP@0.5", "detection", at_least=True, is_fraction=True),
    "total_time_s": Kind("Total time", None, at_least=False, is_fraction=False),
}


def check_targets(metrics: Mapping[str, Any], targets: Mapping[str, float | None]) -> tuple[dict[str, Any], list[str]]:
    """Targets as `{name: {target, value, met}}`, and one line for each that is missed.

    A target of None is no target. Raises UserError for a name that is not one of KINDS.
    """
    judged: dict[str, Any] = {}
    misses: list[str] = []
    for name, target in targets.items():
        if name not in KINDS:
            raise UserError(f"There is no target {name!r}; the targets are {', '.join(KINDS)}.")
        if target is None:
            continue
        kind = KINDS[name]
        value = metrics[name] if kind.task is None else (metrics[kind.task] or {}).get(name)
        met = value is not None and (value >= target if kind.at_least else value <= target)
        judged[name] = {"target": float(target), "value": value, "met": bool(met)}
        if not met:
            misses.append(_miss(name, kind, value, target, metrics))
    return judged, misses


def _miss(name: str, kind: Kind, value: float | None, target: float, metrics: Mapping[str, Any]) -> str:
    if value is not None:
        side = "below" if kind.at_least else "above"
        return f"{kind.label} is {kind.text(value)}, {side} the target of {kind.text(target)}."
    if kind.task is None:
        return f"{kind.label} is not known, so its target of {kind.text(target)} is not met."
    if metrics[kind.task] is None:
        return f"{kind.label} has no value: the {kind.task} task was not judged in this run."
    return f"{kind.label} has no value: no labelled sample of the {metrics['split']} split could be judged."


def verdict_lines(metrics: Mapping[str, Any]) -> Table:
    """The verdict as a rich table: targets first, then the figures without one. `misses` are not in it."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    result = "all targets met" if metrics["met"] else "targets missed"
    if not metrics["targets"] and metrics["met"]:
        result = "no targets set"
    table = Table(
        title=f"{result} ({metrics['split']} split)",
        title_style="bold green" if metrics["met"] else "bold red",
        box=box.SIMPLE_HEAD,
    )
    for heading, justify in (("", "left"), ("value", "right"), ("target", "right"), ("met", "left")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for name, entry in metrics["targets"].items():
        kind = KINDS[name]
        sign = "≥" if kind.at_least else "≤"
        met = Text("yes", "green") if entry["met"] else Text("no", "bold red")
        table.add_row(kind.label, kind.text(entry["value"]), f"{sign} {kind.text(entry['target'])}", met)
    for label, text in other_figures(metrics):
        table.add_row(label, text, "", "")
    return table


def other_figures(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Headline figures that have no target, as (label, text), leaving out the tasks that were not judged."""
    rows: Sequence[tuple[str, str, str]] = (
        ("detection", "map50", "Detection mAP@0.5"),
        ("detection", "map50_95", "Detection mAP@0.5:0.95"),
        ("classification", "top1", "Classification top-1"),
        ("classification", "top5", "Classification top-5"),
        ("classification", "macro_f1", "Classification macro-F1"),
        ("pipeline", "pill_accuracy", "End to end, pills right"),
        ("pipeline", "photo_accuracy", "End to end, photos all right"),
    )
    figures = [
        (label, percent(metrics[part][name]))
        for part, name, label in rows
        if name not in metrics["targets"] and metrics[part] and metrics[part][name] is not None
    ]
    if "total_time_s" not in metrics["targets"] and metrics["total_time_s"] is not None:
        figures.append(("Total time", duration(metrics["total_time_s"])))
    return figures


def percent(fraction: float | None, digits: int = 2) -> str:
    """0.8512 -> '85.12 %'."""
    return "–" if fraction is None else f"{100 * fraction:.{digits}f} %"


def duration(seconds: float | None) -> str:
    """Seconds as people read them: 12 s, 3 min 05 s, 1 h 58 min."""
    if seconds is None:
        return "–"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"
