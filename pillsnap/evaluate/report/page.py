"""Writes the report of a run: one HTML file without external resources, from the templates beside this module."""

from __future__ import annotations

import base64
import hashlib
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa
from markupsafe import Markup

from pillsnap.evaluate.predictions import Predictions
from pillsnap.evaluate.report import classes as report_classes
from pillsnap.evaluate.report import cost, curves, gallery, results, run_summary
from pillsnap.evaluate.report.charts import reliability_diagram
from pillsnap.evaluate.targets import duration, percent
from pillsnap.files import write_atomically
from pillsnap.manifest.table import ClassInfo
from pillsnap.metrics.boxes import read_photos
from pillsnap.photos.decode import DEFAULT_MAX_PIXELS
from pillsnap.photos.reader import PhotoReader

REPORT_NAME = "report.html"
NUM_WORST, NUM_EXAMPLES = 12, 8
DEFAULT_CONFIDENCE = 0.25
# HTML cannot hold control characters, nor UTF-8 lone surrogates.
_NOT_PRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def write_report(
    run_dir: Path,
    metrics: Mapping[str, Any],
    predictions: Predictions,
    *,
    manifest: pa.Table,
    classes: Sequence[ClassInfo],
    events: Sequence[Mapping[str, Any]],
    data_root: Path | str | None,
    compare: Mapping[str, Any] | None = None,
    confidence: float = DEFAULT_CONFIDENCE,
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> Path:
    """Write `report.html` into the run directory, atomically, and return its path.

    `metrics` are those of `collect_metrics`, `compare` those of an earlier run. Without a `data_root` the report shows
    no photos.
    """
    reader = None if data_root is None else PhotoReader(str(data_root), max_pixels)
    codes = [info.code for info in classes]
    detection, classification, crops = metrics["detection"], metrics["classification"], predictions.classification
    outcomes = gallery.photo_outcomes(read_photos(manifest, metrics["split"]), predictions.tables, codes, confidence)
    pictures = {}
    if reader is not None:
        shown = {"photos": gallery.worst(outcomes, NUM_WORST), "examples": gallery.examples(outcomes, NUM_EXAMPLES)}
        pictures = {name: [gallery.picture(each, reader) for each in chosen] for name, chosen in shown.items()}
    page = _templates().get_template("page.html").render(
        metrics=metrics,
        verdict=results.verdict(metrics),
        about=run_summary.split_sentence(metrics),
        comparison=None if compare is None else results.comparison(metrics, compare),
        curves=curves.learning_curves(events),
        precision_recall=results.precision_recall_chart(detection) if detection and detection["num_boxes"] else None,
        reliability=_reliability(classification),
        risk=results.risk_coverage_chart(answers) if (answers := (classification or {}).get("answers")) else None,
        confusion=None if crops is None else report_classes.confusion(crops, codes),
        num_classes=len(codes),
        num_photos=len(outcomes),
        num_mistaken=sum(outcome.error > 0 for outcome in outcomes),
        can_show_photos=reader is not None,
        pictures=pictures,
        classes=None if crops is None else report_classes.class_rows(crops, classes),
        data=run_summary.data_quality(manifest, events, predictions.errors),
        time=run_summary.time_breakdown(metrics, events),
        cost=cost.cost(events),
        environment=run_summary.environment(events),
        written_at=time.time(),
    )  # fmt: skip
    path = Path(run_dir) / REPORT_NAME
    write_atomically(path, _NOT_PRINTABLE.sub("\ufffd", page).encode("utf-8"))
    return path


def _reliability(classification: Mapping[str, Any] | None) -> Any:
    if classification is None or not classification["num_samples"]:
        return None
    calibration = classification["calibration"]
    return reliability_diagram(calibration["confidence"], calibration["accuracy"], calibration["count"])


def _templates() -> jinja2.Environment:
    loader = jinja2.PackageLoader("pillsnap.evaluate.report")
    templates = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    script, _, _ = loader.get_source(templates, "page.js")
    templates.globals |= {
        "script": Markup(script),
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }
    templates.filters |= {
        "percent": percent,
        "duration": duration,
        "number": "{:,}".format,
        "moment": run_summary.moment,
    }
    return templates
