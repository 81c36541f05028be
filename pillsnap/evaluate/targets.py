"""Targets of a run: whether each is met, and the table of results for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pillsnap.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Kind:
    """A kind of target: its task (None: the whole run), direction and unit."""

    label: str
    task: str | None
    at_least: bool
    is_fraction: bool

    def text(self, value: float | None) -> str:
        """The value formatted for people."""
        if value is None:
            return "–"
        return percent(value) if self.is_fraction else duration(value)


KINDS = {
    "top1": Kind("Classification top-1", "classification", at_least=True, is_fraction=True),
    "top5": Kind("Classification top-5", "classification", at_least=True, is_fraction=True),
    "map50": Kind("Detection mAP@0.5", "detection", at_least=True, is_fraction=True),
    "total_time_s": Kind("Total time", None, at_least=False, is_fraction=False),
}


def check_targets(metrics: Mapping[str, Any], targets: Mapping[str, float | None]) -> tuple[dict[str, Any], list[str]]:
    """Results as `{name: {target, value, met}}`, and one line for each missed target.

    A target of None is not checked. Raises UserError for a name that is not one of KINDS.
    """
    results: dict[str, Any] = {}
    misses: list[str] = []
    for name, target in targets.items():
        if name not in KINDS:
            raise UserError(f"There is no target {name!r}; the targets are {', '.join(KINDS)}.")
        if target is None:
            continue
        kind = KINDS[name]
        value = metrics[name] if kind.task is None else (metrics[kind.task] or {}).get(name)
        met = value is not None and (value >= target if kind.at_least else value <= target)
        results[name] = {"target": float(target), "value": value, "met": bool(met)}
        if not met:
            misses.append(_miss(name, kind, value, target, metrics))
    return results, misses


def _miss(name: str, kind: Kind, value: float | None, target: float, metrics: Mapping[str, Any]) -> str:
    if value is not None:
        side = "below" if kind.at_least else "above"
        return f"{kind.label} is {kind.text(value)}, {side} the target of {kind.text(target)}."
    if kind.task is None:
        return f"{kind.label} is unknown, so its target of {kind.text(target)} is not met."
    if metrics[kind.task] is None:
        return f"{kind.label} has no value: the {kind.task} task was not evaluated in this run."
    return f"{kind.label} has no value: the {metrics['split']} split has no labelled sample that could be evaluated."


def results_table(metrics: Mapping[str, Any]) -> Table:
    """The results as a rich table: targets first, then metrics without one. It does not contain `misses`."""
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
    for label, text in other_metrics(metrics):
        table.add_row(label, text, "", "")
    return table


def other_metrics(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Headline metrics without a target, as (label, text), of the tasks that were evaluated."""
    rows: Sequence[tuple[str, str, str]] = (
        ("detection", "map50", "Detection mAP@0.5"),
        ("detection", "map50_95", "Detection mAP@0.5:0.95"),
        ("classification", "top1", "Classification top-1"),
        ("classification", "top5", "Classification top-5"),
        ("classification", "macro_f1", "Classification macro-F1"),
        ("pipeline", "pill_accuracy", "End to end, pills correct"),
        ("pipeline", "photo_accuracy", "End to end, photos all correct"),
    )
    found = [
        (label, percent(metrics[part][name]))
        for part, name, label in rows
        if name not in metrics["targets"] and metrics[part] and metrics[part][name] is not None
    ]
    if "total_time_s" not in metrics["targets"] and metrics["total_time_s"] is not None:
        found.append(("Total time", duration(metrics["total_time_s"])))
    return found


def percent(fraction: float | None, digits: int = 2) -> str:
    """0.8512 -> '85.12 %'."""
    return "–" if fraction is None else f"{100 * fraction:.{digits}f} %"


def duration(seconds: float | None) -> str:
    """Seconds formatted for people: 12 s, 3 min 05 s, 1 h 58 min."""
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
