"""Metrics of answers restricted to a list of possible codes, beside those of the same pills without the restriction."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pillsnap.errors import UserError
from pillsnap.evaluate.predictions import Predictions, predict_manifest
from pillsnap.metrics.classification import accuracies
from pillsnap.metrics.end_to_end import pipeline_metrics
from pillsnap.metrics.evidence import gather
from pillsnap.observe.work_progress import Progress, unseen
from pillsnap.runs.directory import Run


def restricted_metrics(
    run: Run, photos: pa.Table, allowed: list[str], predictions: Predictions, split: str, progress: Progress = unseen
) -> dict[str, Any]:
    """`num_codes`, and `classification` and `pipeline` with `restricted` and `unrestricted` each.

    `classification` is over the labelled pills of the `allowed` codes; `pipeline` over the photos that show no other
    pill. None where a model was not trained. `predictions` are those of `photos` without the restriction. Raises
    UserError when no photo shows an allowed code. Ray must be initialised.
    """
    possible = set(allowed)
    shows = [not possible.isdisjoint(codes) for codes in photos["codes"].to_pylist()]
    if not any(shows):
        raise UserError(f"No photo of the split {split!r} shows one of the {len(allowed):,} codes of --allow.")
    evidence = gather([{"code": code} for code in run.codes], allowed)
    restricted = predict_manifest(
        photos.filter(pa.array(shows)), run.where, run.settings, run.codes, run.data_root,
        fitted_here=predictions.fitted_here, evidence=evidence, enrolled=run.enrolled, progress=progress,
    )  # fmt: skip
    labels = pa.array([index for index, code in enumerate(run.codes) if code in possible])
    only_possible = [possible.issuperset(codes) for codes in run.manifest["codes"].to_pylist()]
    manifest = run.manifest.filter(pa.array(only_possible))

    def classification(found: Predictions) -> dict[str, Any] | None:
        crops = found.classification
        return None if crops is None else accuracies(crops.filter(pc.is_in(crops["label"], labels)), len(run.codes))

    def pipeline(found: Predictions) -> dict[str, Any] | None:
        return None if found.pipeline is None else pipeline_metrics(manifest, found.pipeline, run.codes, split)

    both = {"restricted": restricted, "unrestricted": predictions}
    return {
        "num_codes": len(allowed),
        "classification": {name: classification(found) for name, found in both.items()},
        "pipeline": {name: pipeline(found) for name, found in both.items()},
    }
