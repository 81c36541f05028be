"""Report sections on how good the models are: verdict, figures, comparison, detection, end to end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pillsnap.evaluate.report import charts
from pillsnap.evaluate.report.markup import Content, Markup, grid, section, tag
from pillsnap.evaluate.targets import KINDS, duration, percent

FIGURES = (
    ("detection", "map50", "mAP@0.5"),
    ("detection", "map50_95", "mAP@0.5:0.95"),
    ("detection", "precision", "Detection precision"),
    ("detection", "recall", "Detection recall"),
    ("classification", "top1", "Top-1"),
    ("classification", "top5", "Top-5"),
    ("classification", "macro_f1", "Macro-F1"),
    ("pipeline", "pill_accuracy", "End to end: pills right"),
    ("pipeline", "photo_accuracy", "End to end: photos all right"),
)
_TILES = (
    ("detection", "map50", "Detection mAP@0.5", "num_photos", "photos"),
    ("detection", "map50_95", "mAP@0.5:0.95", "num_photos", "photos"),
    ("classification", "top1", "Classification top-1", "num_samples", "crops"),
    ("classification", "top5", "Top-5", "num_samples", "crops"),
    ("pipeline", "pill_accuracy", "End to end, pills", "num_pills", "pills"),
    ("pipeline", "photo_accuracy", "Photos all right", "num_photos", "photos"),
)


def verdict(metrics: Mapping[str, Any]) -> Markup:
    """Whether the targets were met, each with its value, and why not."""
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
        kind = KINDS[name]
        sign = "≥" if kind.at_least else "≤"
        word = tag("span", "met" if entry["met"] else "missed", class_="yes" if entry["met"] else "no")
        cells: list[Content] = [kind.label, kind.text(entry["value"]), f"{sign} {kind.text(entry['target'])}"]
        classes = (None, "big n", "n", "wide", None)
        rows.append(
            tag(
                "tr",
                [tag("td", c, class_=k) for c, k in zip([*cells, _meter(name, entry), word], classes, strict=True)],
            )
        )
    headings = zip(("Target", "Value", "Wanted", "", "Verdict"), (None, "n", "n", "wide", None), strict=True)
    head = tag("thead", tag("tr", [tag("th", text, class_=kind, scope="col") for text, kind in headings]))
    table = tag("div", tag("table", head, tag("tbody", rows)), class_="scroll") if rows else None
    reasons = tag("ul", [tag("li", miss) for miss in misses], class_="misses") if misses else None
    return section("verdict", title, reasons, table, class_=f"verdict {state}")


def tiles(metrics: Mapping[str, Any]) -> Markup | None:
    """The headline figures of the tasks that were judged."""
    cells = []
    for part, name, label, count, unit in _TILES:
        if metrics[part] is not None:
            number = metrics[part][count]
            small = f"of {number:,} {unit}" if number else f"no {unit} to judge"
            cells.append(tag("div", tag("span", label), tag("b", percent(metrics[part][name])), tag("span", small)))
    return tag("div", cells, class_="tiles") if cells else None


def comparison(metrics: Mapping[str, Any], earlier: Mapping[str, Any]) -> Markup:
    """Figures of this run beside those of an earlier one."""
    rows: list[list[Content]] = []
    for part, name, label in FIGURES:
        now, then = ((source.get(part) or {}).get(name) for source in (metrics, earlier))
        change: Content = "–"
        if now is not None and then is not None:
            points = 100 * (now - then)
            text = f"{points:+.2f}".replace("-", "−")
            change = text if abs(points) < 0.005 else tag("span", text, class_="yes" if points > 0 else "no")
        rows.append([label, percent(then), percent(now), change])
    now, then = metrics["total_time_s"], earlier.get("total_time_s")
    change = "–"
    if now is not None and then:
        change = tag(
            "span", f"{100 * (now / then - 1):+.0f} %".replace("-", "−"), class_="yes" if now <= then else "no"
        )
    rows.append(["Total time", duration(then), duration(now), change])
    photos = [source.get("split_facts", {}).get("num_photos") for source in (earlier, metrics)]
    note = None
    if photos[0] != photos[1]:
        note = tag("p", f"The two were judged on different photos ({photos[0]} and {photos[1]}): compare with care.")
    name = str(earlier.get("run", "earlier run"))
    return section(
        "comparison", f"Compared with {name}", note, grid(("", name, "this run", "change, points"), rows, (1, 2, 3))
    )


def detection(figures: Mapping[str, Any] | None, facts: Mapping[str, Any] | None = None) -> Markup:
    if figures is None:
        return section("detection", "Detection", tag("p", "The detection task was not judged in this run."))
    if figures["map50"] is None:
        text = "No photo of the split has a label box for every pill, so there is nothing to judge the detector by."
        return section("detection", "Detection", tag("p", text))
    curve = figures["pr_curve"]
    best = charts.Mark(figures["recall"], figures["precision"], f"best F1 at {figures['best_f1_confidence']:.2f}")
    chart = charts.line_chart(
        "Precision over recall at IoU 0.5",
        [charts.Series("precision", curve["recall"], curve["precision"])],
        x_label="recall",
        x_range=(0, 1),
        y_range=(0, 1),
        x_text=charts.percent_tick,
        y_text=charts.percent_tick,
        marks=[best],
        fill=True,
    )
    table = grid(
        ("", ""),
        [
            ["mAP@0.5", percent(figures["map50"])],
            ["mAP@0.5:0.95", percent(figures["map50_95"])],
            ["Precision at best F1", percent(figures["precision"])],
            ["Recall at best F1", percent(figures["recall"])],
            ["Confidence of best F1", f"{figures['best_f1_confidence']:.2f}"],
            ["Photos judged", f"{figures['num_photos']:,}"],
            ["Pills in them", f"{figures['num_boxes']:,}"],
            ["Photos left out (a pill without a label box)", f"{figures['num_photos_left_out']:,}"],
        ],
        (1,),
    )
    intro = "One class, pill. Averages are computed as ultralytics does, where a perfect detector reaches 99.5 %."
    return section("detection", "Detection", tag("p", intro), tag("div", chart, table, class_="charts pair"))


def end_to_end(figures: Mapping[str, Any] | None) -> Markup:
    """Where the two-stage pipeline loses its pills."""
    title = "End to end on combination photos"
    if figures is None:
        return section("pipeline", title, tag("p", "Needs both tasks; at least one was not judged in this run."))
    if not figures["num_photos"]:
        return section(
            "pipeline", title, tag("p", "The split has no combination photo with a label box for every pill.")
        )
    pills = figures["num_pills"]
    steps = (
        ("Labelled pills", 1.0, pills),
        ("Found by the detector", figures["detected"], round(figures["detected"] * pills)),
        ("And named right", figures["pill_accuracy"], round(figures["pill_accuracy"] * pills)),
    )
    bars = [
        tag(
            "div",
            tag("span", name),
            tag("span", tag("i", style=f"width:{100 * share:.2f}%"), class_="track"),
            tag("b", f"{count:,} · {percent(share, 1)}"),
        )
        for name, share, count in steps
    ]
    rows = [
        ["Photos with every pill right", percent(figures["photo_accuracy"])],
        ["Photos with every pill right and no surplus box", percent(figures["photo_accuracy_strict"])],
        ["Names right among the pills found", percent(figures["named_if_detected"])],
        ["Surplus boxes a photo", f"{figures['surplus_per_photo']:.2f}"],
        ["Photos judged", f"{figures['num_photos']:,}"],
        ["Photos left out (a pill without a label box)", f"{figures['num_photos_left_out']:,}"],
    ]
    intro = "A pill is right when one box overlaps its label box by half (IoU 0.5) and carries its code."
    return section("pipeline", title, tag("p", intro), tag("div", bars, class_="bars"), grid(("", ""), rows, (1,)))


def _meter(name: str, entry: Mapping[str, Any]) -> Markup | None:
    value, target = entry["value"], entry["target"]
    if value is None:
        return None
    whole = 1.0 if KINDS[name].is_fraction else 1.15 * max(value, target)
    bar = tag("i", style=f"width:{min(100 * value / whole, 100):.2f}%")
    mark = tag("b", style=f"left:{min(100 * target / whole, 100):.2f}%")
    return tag("span", bar, mark, class_="meter met" if entry["met"] else "meter")
