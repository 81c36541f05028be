"""The models' answers to the photos of a manifest as tables, and the files in which they are kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pillsnap.config import Settings
from pillsnap.evaluate.both_sides import manifest_pairs, side_pairs
from pillsnap.evaluate.inference import DOUBLES, FLOATS, INTS, UNKNOWN, infer
from pillsnap.metrics.both_sides import SidePairs
from pillsnap.metrics.calibration import cross_fitted_confidence
from pillsnap.metrics.evidence import Evidence
from pillsnap.metrics.limits import Limits
from pillsnap.observe.work_progress import Progress, unseen
from pillsnap.runs.enrolled import Enrolled

TABLES = ("detections", "classification", "pipeline")


@dataclass(frozen=True)
class Predictions:
    """Tables of one split; None where a model was not trained. `errors`: sample id -> why it could not be read."""

    detections: pa.Table | None
    classification: pa.Table | None
    pipeline: pa.Table | None
    errors: dict[str, str]
    temperature: float = 1.0
    """Divisor of the classifier's logits."""
    fitted_here: bool = True
    """Whether these photos chose the epochs and fitted the temperature."""
    unknown: pa.Table | None = None
    """Crops of classes that were not trained, with the columns of `classification`; None without limits."""
    both_sides: SidePairs | None = None

    @property
    def tables(self) -> dict[str, pa.Table | None]:
        return {name: getattr(self, name) for name in TABLES}

    def write(self, run_dir: Path) -> None:
        """Write `predictions/<table>.parquet`; delete the files of tables that are None."""
        folder = run_dir / "predictions"
        folder.mkdir(parents=True, exist_ok=True)
        for name, table in self.tables.items():
            if table is None:
                (folder / f"{name}.parquet").unlink(missing_ok=True)
            else:
                pq.write_table(table, folder / f"{name}.parquet")


def predict_manifest(
    manifest: pa.Table,
    run: str | Path,
    settings: Settings,
    codes: list[str],
    data_root: str,
    *,
    fitted_here: bool,
    detect: bool = True,
    evidence: Evidence | None = None,
    limits: Limits | None = None,
    enrolled: Enrolled | None = None,
    progress: Progress = unseen,
) -> Predictions:
    """Run both models of `run` (a folder or URI), or the classifier alone, over the photos of `manifest`. Ray must be
    initialised. `enrolled` drugs are the last of `codes`.

    `fitted_here`: these photos chose the epochs and fitted the temperature, so that the confidences to be checked
    (`held_out_confidence`) are cross-fitted by the photos' groups. With `limits` the tables have the likeness
    `known` of each crop, else null.
    """
    pairs = manifest_pairs(manifest, codes) if evidence is None else []
    logits_of = {sample_id for pair in pairs for sample_id in pair}
    rows = infer(
        manifest, run, settings, codes, data_root, detect=detect, evidence=evidence, logits_of=logits_of,
        limits=limits, enrolled=enrolled, progress=progress,
    )  # fmt: skip
    errors = {row["sample_id"]: row["error"] for row in rows if row["error"]}
    rows = [row for row in rows if not row["error"]]
    has_detector = any(row["boxes"] is not None for row in rows)
    has_classifier = any(row["label"] is not None for row in rows)
    detections = [
        {name: row[name] for name in ("sample_id", "image_type", "boxes", "scores")}
        for row in rows
        if row["boxes"] is not None
    ]
    crops = [
        {"sample_id": row["sample_id"], "image_type": row["image_type"], "box_index": box_index, "label": label,
         "top_indices": indices, "top_probs": probs, "raw_confidence": raw, "held_out_confidence": probs[0],
         "known": known}
        for row in rows
        for box_index, label, indices, probs, raw, known in zip(
            *(row[name] or [] for name in ("box_index", "label", "top_indices", "top_probs", "raw")),
            row["known"] or [None] * len(row["label"] or []), strict=True,
        )
    ]  # fmt: skip
    named = []
    for row in rows:
        if row["named_top"] is not None:
            count = len(row["named_top"])
            named.append({"sample_id": row["sample_id"], "image_type": row["image_type"], "boxes": row["boxes"][:count],
                          "scores": row["scores"][:count], "indices": [top[0] for top in row["named_top"]],
                          "probs": [probs[0] for probs in row["named_probs"]],
                          "known": row["named_known"]})  # fmt: skip
    base = [("sample_id", pa.string()), ("image_type", pa.string())]
    found = [*base, ("boxes", pa.list_(FLOATS)), ("scores", FLOATS)]
    crop_columns = [
        *base,
        ("box_index", pa.int64()),
        ("label", pa.int64()),
        ("top_indices", INTS),
        ("top_probs", FLOATS),
        ("raw_confidence", pa.float32()),
        ("held_out_confidence", pa.float32()),
        ("known", pa.float64()),
    ]
    trained = [number for number, crop in enumerate(crops) if crop["label"] != UNKNOWN]
    unknown = [crop for crop in crops if crop["label"] == UNKNOWN]
    crops = [crops[number] for number in trained]
    if fitted_here and crops:
        groups = dict(zip(*(manifest[name].to_pylist() for name in ("sample_id", "group")), strict=True))
        facts = np.array([facts for row in rows for facts in row["calibration_facts"] or []])[trained]
        confidences = cross_fitted_confidence(facts, np.array([groups[crop["sample_id"]] for crop in crops]))
        for crop, confidence in zip(crops, confidences.tolist(), strict=True):
            crop["held_out_confidence"] = confidence
    return Predictions(
        detections=pa.Table.from_pylist(detections, pa.schema(found)) if has_detector else None,
        classification=pa.Table.from_pylist(crops, pa.schema(crop_columns)) if has_classifier else None,
        pipeline=pa.Table.from_pylist(
            named, pa.schema([*found, ("indices", INTS), ("probs", FLOATS), ("known", DOUBLES)])
        )
        if has_detector and has_classifier
        else None,
        errors=errors,
        temperature=next((row["temperature"] for row in rows if row["temperature"] is not None), 1.0),
        fitted_here=fitted_here,
        unknown=None if limits is None else pa.Table.from_pylist(unknown, pa.schema(crop_columns)),
        both_sides=side_pairs(rows, pairs),
    )
