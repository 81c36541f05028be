"""Report sections on the classifier: accuracy, reliability, what is taken for what, and every class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pillsnap.evaluate.report import charts
from pillsnap.evaluate.report.markup import Content, Markup, grid, section, tag
from pillsnap.evaluate.targets import percent
from pillsnap.metrics.classification import confused_pairs, confusion_matrix, per_class, read_crops

MAX_HEAT_MAP_CLASSES = 60
_MOST_CONFUSED_CLASSES = 40
_MAX_PAIRS = 20


def classification(figures: Mapping[str, Any] | None, table: pa.Table | None, classes: Sequence[str]) -> Markup:
    """Accuracy by image type, reliability, and what is taken for what."""
    if figures is None or table is None:
        return section(
            "classification", "Classification", tag("p", "The classification task was not judged in this run.")
        )
    rows = [
        [label, *(percent(part[name]) for name in ("top1", "top5", "macro_f1")), f"{part['num_samples']:,}"]
        for label, part in (
            ("All", figures),
            ("Single", figures["single"]),
            ("Combination", figures["combination"]),
        )
    ]
    accuracy = grid(("", "Top-1", "Top-5", "Macro-F1", "Crops"), rows, (1, 2, 3, 4))
    calibration = figures["calibration"]
    right: Content = None
    if figures["num_samples"]:
        diagram = charts.reliability_diagram(calibration["confidence"], calibration["accuracy"], calibration["count"])
        text = (
            f"Expected calibration error {percent(calibration['ece'])} (15 bins), "
            f"{percent(calibration['ece_before'])} before the temperature."
        )
        right = tag("div", diagram, tag("p", text, class_="soft"))
    pairs = [
        [tag("code", pair["true"]), tag("code", pair["predicted"]), f"{pair['count']:,} of {pair['n']:,}"]
        for pair in figures["confused_pairs"][:_MAX_PAIRS]
    ]
    confused: Content = tag("p", "Not one crop was given a wrong name.")
    if pairs:
        confused = grid(("True", "Named", "Crops"), pairs, (2,))
    unknown = figures["num_unknown_class"]
    return section(
        "classification",
        "Classification",
        tag(
            "p", f"Crops at the label boxes, {len(classes):,} classes: what the classifier does when the box is right."
        ),
        tag("p", f"{unknown:,} crops are of classes that were not trained; they count as mistakes.")
        if unknown
        else None,
        accuracy,
        tag("div", right, tag("div", tag("h3", "Most confused pairs"), confused), class_="charts pair"),
        _confusion(table, classes),
    )


def class_table(table: pa.Table | None, classes: Sequence[str], names: Mapping[str, str]) -> Markup | None:
    """Every class with its figures, worst first, with a search box."""
    if table is None:
        return None
    crops = read_crops(table)
    rows = per_class(crops.labels, crops.predicted, classes)
    rows.sort(key=lambda row: (row["f1"] is None, row["f1"] or 0.0, -row["n"], row["code"]))
    named = any(names.get(code) for code in classes)
    headings = [("Code", None), ("Crops", "n"), ("Precision", "n wide"), ("Recall", "n wide"), ("F1", "n")]
    if named:
        headings.insert(1, ("Name", None))
    head = [tag("th", tag("button", text, type="button"), scope="col", class_=kind) for text, kind in headings]
    body = []
    for row in rows:
        cells = [tag("td", row["code"], class_="code")]
        if named:
            cells.append(tag("td", names.get(row["code"], "")))
        cells.append(tag("td", f"{row['n']:,}", class_="n"))
        cells += [
            tag("td", percent(row[name], 1), class_=kind)
            for name, kind in (("precision", "n wide"), ("recall", "n wide"), ("f1", "n"))
        ]
        body.append(tag("tr", cells))
    unseen = sum(row["n"] == 0 for row in rows)
    search = tag(
        "div",
        tag("input", id="find", type="search", placeholder="Search code or name", aria_label="Search classes"),
        tag("span", f"{len(rows):,} classes", id="shown", class_="soft", role="status"),
        class_="find",
    )
    grid_ = tag("table", tag("thead", tag("tr", head)), tag("tbody", body), id="classes-table")
    note = f"{unseen:,} of {len(rows):,} classes have no crop in this split." if unseen else None
    return section(
        "classes",
        "Classes",
        tag("p", "Worst F1 first. ", note),
        search,
        tag("div", grid_, class_="tall", tabindex=0),
        tag("p", "On paper: the 60 worst classes.", class_="paper soft") if len(rows) > 60 else None,
    )


def _confusion(table: pa.Table, classes: Sequence[str]) -> Markup | None:
    crops = read_crops(table)
    matrix = confusion_matrix(crops.labels, crops.predicted, len(classes))
    if len(classes) <= MAX_HEAT_MAP_CLASSES:
        shown = list(range(len(classes)))
        title = "Confusion: true codes down, given names across"
    else:
        position = {code: i for i, code in enumerate(classes)}
        chosen: set[int] = set()
        for pair in confused_pairs(crops.labels, crops.predicted, classes):
            chosen |= {position[pair["true"]], position[pair["predicted"]]}
            if len(chosen) >= _MOST_CONFUSED_CLASSES:
                break
        shown = sorted(chosen)
        title = f"Confusion among the {len(shown)} classes that are confused most: true codes down, given names across"
    if not shown or not matrix.any():
        return None
    return charts.heat_map(matrix[np.ix_(shown, shown)], matrix.sum(1)[shown], [classes[i] for i in shown], title)
