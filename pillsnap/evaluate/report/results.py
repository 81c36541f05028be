"""Report data on how good the models are: result of the targets, comparison, detection curve."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pillsnap.evaluate.report.charts import Chart, Line, Mark, line_chart
from pillsnap.evaluate.targets import KINDS, duration, percent

_COMPARED = (
    ("detection", "map50", "mAP@0.5"),
    ("detection", "map50_95", "mAP@0.5:0.95"),
    ("detection", "precision", "Detection precision"),
    ("detection", "recall", "Detection recall"),
    ("classification", "top1", "Top-1"),
    ("classification", "top5", "Top-5"),
    ("classification", "macro_f1", "Macro-F1"),
    ("pipeline", "pill_accuracy", "End to end: pills correct"),
    ("pipeline", "photo_accuracy", "End to end: photos all correct"),
)


def verdict(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Title and state of the verdict, and one row per target; `meter` is (value, target) in percent of the bar."""
    targets, misses = metrics["targets"], metrics["misses"]
    missed = sum(not entry["met"] for entry in targets.values())
    state = "met" if metrics["met"] else "missed"
    if not targets and not misses:
        title, state = "No targets were set", "none"
    elif metrics["met"]:
        title = "All targets met" if len(targets) > 1 else "Target met"
    elif missed:
        title = f"{missed} of {len(targets)} targets missed"
    else:
        title = "Not fit to use"
    rows = []
    for name, entry in targets.items():
        kind, value, target = KINDS[name], entry["value"], entry["target"]
        meter = None
        if value is not None:
            whole = 1.0 if kind.is_fraction else 1.15 * max(value, target)
            meter = [min(100 * each / whole, 100) for each in (value, target)]
        wanted = f"{'≥' if kind.at_least else '≤'} {kind.text(target)}"
        rows.append({**entry, "label": kind.label, "value": kind.text(value), "wanted": wanted, "meter": meter})
    return {"title": title, "state": state, "rows": rows}


def comparison(metrics: Mapping[str, Any], earlier: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics of this run and of an earlier one; a change is (text, whether it is an improvement, or None)."""
    rows = []
    for part, name, label in _COMPARED:
        now, then = ((source.get(part) or {}).get(name) for source in (metrics, earlier))
        change: tuple[str, bool | None] = ("–", None)
        if now is not None and then is not None:
            points = 100 * (now - then)
            change = (f"{points:+.2f}".replace("-", "−"), None if abs(points) < 0.005 else points > 0)
        rows.append((label, percent(then), percent(now), change))
    now, then = metrics["total_time_s"], earlier.get("total_time_s")
    change = ("–", None)
    if now is not None and then:
        change = (f"{100 * (now / then - 1):+.0f} %".replace("-", "−"), now <= then)
    rows.append(("Total time", duration(then), duration(now), change))
    photos = [source.get("split_facts", {}).get("num_photos") for source in (earlier, metrics)]
    return {"name": earlier.get("run", "earlier run"), "rows": rows, "num_photos": photos}


def risk_coverage_chart(answers: Mapping[str, Any]) -> Chart:
    """Share of wrong answers over the share of crops that are answered; the mark is the run's own limit."""
    curve = answers["risk_coverage"]
    mark = None
    if answers["coverage"]:
        mark = Mark(answers["coverage"], answers["wrong"], f"{percent(answers['coverage'], 0)} answered")
    return line_chart(
        "Share of wrong answers by the share of crops that are answered",
        [Line("wrong", curve["coverage"], curve["wrong"])],
        x_label="answered, the most confident first",
        x_range=(0, 1),
        y_range=(0, max(1.1 * max(curve["wrong"]), 2 * answers["max_wrong"])),
        x_percent=True,
        mark=mark,
        fill=True,
    )


def precision_recall_chart(detection: Mapping[str, Any]) -> Chart:
    curve = detection["pr_curve"]
    return line_chart(
        "Precision over recall at IoU 0.5",
        [Line("precision", curve["recall"], curve["precision"])],
        x_label="recall",
        x_range=(0, 1),
        y_range=(0, 1),
        x_percent=True,
        y_percent=True,
        mark=Mark(detection["recall"], detection["precision"], f"best F1 at {detection['best_f1_confidence']:.2f}"),
        fill=True,
    )
