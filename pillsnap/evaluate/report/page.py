"""The report of a run: one HTML file that needs nothing outside itself."""

from __future__ import annotations

import base64
import hashlib
import re
import time
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import pyarrow as pa

from pillsnap.evaluate.report import classes as report_classes
from pillsnap.evaluate.report import cost as report_cost
from pillsnap.evaluate.report import curves as report_curves
from pillsnap.evaluate.report import gallery
from pillsnap.evaluate.report import results as report_results
from pillsnap.evaluate.report import run_summary as report_run
from pillsnap.evaluate.report.markup import Content, Markup, join, section, tag
from pillsnap.files import write_atomically
from pillsnap.manifest.table import ClassInfo
from pillsnap.metrics.boxes import read_photos
from pillsnap.photos.decode import DEFAULT_MAX_PIXELS
from pillsnap.photos.reader import PhotoReader

REPORT_NAME = "report.html"
NUM_WORST, NUM_EXAMPLES = 12, 8
DEFAULT_CONFIDENCE = 0.25


def write_report(
    run_dir: Path,
    metrics: Mapping[str, Any],
    *,
    manifest: pa.Table,
    classes: Sequence[ClassInfo],
    tables: Mapping[str, pa.Table | None],
    events: Sequence[Mapping[str, Any]],
    data_root: Path | str | None,
    compare: Mapping[str, Any] | None = None,
    unread: Mapping[str, str] | None = None,
    confidence: float = DEFAULT_CONFIDENCE,
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> Path:
    """Write `report.html` into the run directory, atomically, and return its path.

    `metrics` is what `judge` gave, `compare` what it gave for an earlier run; `tables` has the prediction tables by
    name (detections, classification, pipeline; None where there is none); `unread` says why a photo could not be read,
    by sample id. Without a `data_root` the report shows no photos.
    """
    reader = None if data_root is None else PhotoReader(str(data_root), max_pixels)
    codes = [info.code for info in classes]
    names = {info.code: info.name for info in classes}
    photos = _photos(metrics["split"], manifest, codes, tables, reader, confidence)
    figures = metrics["classification"]
    sections: list[Markup | None] = [
        report_results.verdict(metrics),
        report_results.tiles(metrics),
        report_results.comparison(metrics, compare) if compare is not None else None,
        report_curves.learning_curves(events),
        report_results.detection(metrics["detection"]),
        report_classes.classification(figures, tables.get("classification"), codes),
        report_results.end_to_end(metrics["pipeline"]),
        *photos,
        report_classes.class_table(tables.get("classification"), codes, names),
        report_run.data_quality(metrics, manifest, events, unread or {}),
        report_run.time_breakdown(metrics, events),
        report_cost.cost(events),
        report_run.environment(events),
    ]
    path = Path(run_dir) / REPORT_NAME
    write_atomically(path, _page(metrics, [part for part in sections if part], events).encode("utf-8"))
    return path


def _photos(
    split: str,
    manifest: pa.Table,
    classes: Sequence[str],
    tables: Mapping[str, pa.Table | None],
    reader: PhotoReader | None,
    confidence: float,
) -> list[Markup]:
    cases = gallery.judge_photos(read_photos(manifest, split), tables, classes, confidence)
    if not cases:
        return []
    if reader is None:
        text = "Photos are not shown: the report was written without the folder that holds them (--data-root)."
        return [section("photos", "Photos", tag("p", text))]
    bad = sum(case.badness > 0 for case in cases)
    kinds = (("right", "right"), ("wrong", "wrong name"), ("missed", "not found"), ("surplus", "no labelled pill here"))
    legend = tag("div", [tag("span", tag("i", class_=f"key o-{k}"), text) for k, text in kinds], class_="legend")
    sections = []
    mistakes = f"{bad:,} of {len(cases):,} photos have a mistake."
    for name, title, text, chosen in (
        ("photos", "Worst photos", mistakes, gallery.worst(cases, NUM_WORST)),
        ("examples", "Photos that went right", "A sample of the others.", gallery.examples(cases, NUM_EXAMPLES)),
    ):
        if chosen:
            shown = tag("div", [gallery.picture(case, reader) for case in chosen], class_="photos")
            sections.append(section(name, title, tag("p", text), legend, shown))
    return sections


def _page(metrics: Mapping[str, Any], body: Sequence[Markup], events: Sequence[Mapping[str, Any]]) -> str:
    folder = resources.files("pillsnap.evaluate.report")
    script = (folder / "page.js").read_text(encoding="utf-8")
    stage = metrics["stage"]
    title = f"{metrics['run']}: {'all targets met' if metrics['met'] else 'targets missed'}"
    about: list[Content] = [f"Stage {stage} · " if isinstance(stage, int) else None, f"{metrics['split']} split"]
    runs = report_curves.of_kind(events, "run")
    if runs:
        about.append(f" · started {report_run.moment(runs[0]['time'])}")
    names = re.findall(r'<section id="(\w+)"', "".join(body))
    values: dict[str, str] = {
        "title": join(title),
        "heading": join(metrics["run"]),
        "about": tag("p", about, class_="soft") + tag("p", report_run.split_sentence(metrics)),
        "navigation": tag("nav", [tag("a", name.capitalize(), href=f"#{name}") for name in names]),
        "body": "\n".join(body),
        "footer": join(f"Written by PillSnap, {report_run.moment(time.time())}. The figures are also in metrics.json."),
        "script": script,
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }
    template = (folder / "page.html").read_text(encoding="utf-8")
    # One pass: what is put in is not searched again, so no name of a class can pose as a slot.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template)
