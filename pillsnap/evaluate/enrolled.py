"""Metrics of a run with its enrolled drugs, beside those of the trained classifier alone."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pillsnap.evaluate.predictions import Predictions
from pillsnap.metrics.classification import accuracies
from pillsnap.runs.directory import Run


def enrolled_metrics(run: Run, alone: Predictions, together: Predictions) -> dict[str, Any]:
    """`num_codes`; accuracy over the labelled pills of the `trained` drugs, with `alone`, the top-1 without enrolled
    ones, and of the `enrolled` drugs, None where no photo shows one. `run` has both.
    """
    assert run.enrolled is not None and alone.classification is not None and together.classification is not None
    is_trained = pc.less(together.classification["label"], pa.scalar(run.num_trained))
    trained, new = (together.classification.filter(chosen) for chosen in (is_trained, pc.invert(is_trained)))
    return {
        "num_codes": len(run.enrolled.classes),
        "trained": accuracies(trained, len(run.classes))
        | {"alone": accuracies(alone.classification, run.num_trained)["top1"]},
        "enrolled": accuracies(new, len(run.classes)) if len(new) else None,
    }
