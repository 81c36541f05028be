"""Limits of a run's answers: fitted to its photos, and judged on validation photos that did not fit them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pillsnap.config.settings import EvaluationSettings
from pillsnap.evaluate.inference import infer
from pillsnap.evaluate.predictions import Predictions
from pillsnap.manifest.selection.sampling import name_hashes
from pillsnap.metrics.calibration import folds_of
from pillsnap.metrics.likeness import fit_likeness
from pillsnap.metrics.limits import ANSWERS, Limits
from pillsnap.metrics.selective import (
    CONFIDENCE,
    Threshold,
    auroc,
    choose_threshold,
    fewest_answers,
    lower_limit,
    risk_coverage,
)
from pillsnap.observe.work_progress import Progress, unseen
from pillsnap.runs.directory import Run

MAX_FITTED = 10_000
"""Training photos to which likeness is fitted, evenly over the classes; the least is one per class."""


def fit_to_training(run: Run, model: str, progress: Progress = unseen) -> Limits | None:
    """The likeness of `model` (Limits), from a part of the training photos; None if none has a label box. Ray must be
    initialised.
    """
    photos = part_of(run.manifest.filter(pc.equal(run.manifest["split"], "train")), run.codes, MAX_FITTED)
    rows = infer(
        photos, run.where, run.settings, run.codes, run.data_root, detect=False, features=True, progress=progress
    )
    group_of = _groups(photos)
    labels = [label for row in rows for label in row["label"] or []]
    groups = [group_of[row["sample_id"]] for row in rows for _ in row["label"] or []]
    features = [np.frombuffer(data, np.float32) for row in rows for data in row["features"] or []]
    return fit_likeness(model, np.stack(features), np.array(labels), np.array(groups)) if labels else None


def part_of(photos: pa.Table, codes: list[str], number: int) -> pa.Table:
    """About `number` of the photos, as many of each of the `codes`, in an order by hash; at least one of each."""
    each = max(1, number // len(codes))
    order = np.argsort(name_hashes(photos["sample_id"].to_pylist(), 0, "likeness"), kind="stable")
    shown = photos["codes"].to_pylist()
    taken: Counter[str] = Counter()
    kept = []
    for row in order.tolist():
        if any(taken[code] < each for code in shown[row]):
            taken.update(set(shown[row]))
            kept.append(row)
    return photos.take(sorted(kept))


def judge(
    predictions: Predictions, manifest: pa.Table, fitted: Limits, settings: EvaluationSettings
) -> tuple[Limits, dict[str, Any]]:
    """The limits of the run's answers, and `answers` of metrics.json.

    Where these photos chose the model, the limits are fitted to them; each crop is judged with those that the other
    groups' crops chose, in five parts. Else `fitted` are the limits, and judged as they are.
    """
    crops, unknown = predictions.classification, predictions.unknown
    assert crops is not None and unknown is not None
    group_of = _groups(manifest)
    groups = np.array([group_of[photo] for photo in crops["sample_id"].to_pylist()])
    confidence, raw, known = (crops[name].to_numpy() for name in ("held_out_confidence", "raw_confidence", "known"))
    wrong = np.array([top[0] for top in crops["top_indices"].to_pylist()]) != crops["label"].to_numpy()
    given = np.array([""] * len(wrong), dtype="<U7")
    limits, threshold = fitted, None
    if predictions.fitted_here:
        folds = folds_of(groups)
        for fold in np.unique(folds):
            inside, others = folds == fold, folds != fold
            chosen, _ = _choose(fitted, confidence[others], wrong[others], groups[others], known[others], settings)
            given[inside] = _given(chosen, confidence[inside], known[inside])
        limits, threshold = _choose(fitted, confidence, wrong, groups, known, settings)
    else:
        given = _given(limits, confidence, known)
    answered = given == "code"
    left_out = None
    if len(unknown):
        foreign = unknown["known"].to_numpy()
        answers = _given(limits, unknown["held_out_confidence"].to_numpy(), foreign)
        left_out = _shares(answers) | {
            "false_accepted": float((answers != "unknown").mean()),
            "auroc": auroc(known, foreign),
            "auroc_softmax": auroc(raw, unknown["raw_confidence"].to_numpy()),
        }
    return limits, {
        "max_wrong": limits.max_wrong,
        "level": CONFIDENCE,
        "threshold": None if limits.confidence == np.inf else limits.confidence,
        "least_likeness": None if limits.known == -np.inf else limits.known,
        "upper_bound": threshold and threshold.upper_bound,
        "reason": _reason(limits, len(np.unique(groups))),
        **_shares(given),
        "num_wrong": int((answered & wrong).sum()),
        "wrong": float(wrong[answered].mean()) if answered.any() else None,
        "risk_coverage": risk_coverage(confidence, wrong),
        "left_out": left_out,
    }


def count_answers(limits: Limits, pipeline: pa.Table) -> dict[str, int]:
    """How many of the pills that the detector finds are answered with each of ANSWERS, with the run's own limits."""
    rows = pipeline.select(["probs", "known"]).to_pylist()
    counts = Counter(
        limits.answer(*pill)["answer"] for row in rows for pill in zip(row["probs"], row["known"], strict=True)
    )
    return {answer: counts[answer] for answer in ANSWERS}


def _groups(photos: pa.Table) -> dict[str, str]:
    """Group by sample id."""
    return dict(zip(*(photos[name].to_pylist() for name in ("sample_id", "group")), strict=True))


def _choose(
    fitted: Limits, confidence: np.ndarray, wrong: np.ndarray, groups: np.ndarray, known: np.ndarray,
    settings: EvaluationSettings,
) -> tuple[Limits, Threshold]:  # fmt: skip
    least = lower_limit(known, settings.known_accepted)
    accepted = known >= least
    found = choose_threshold(confidence[accepted], wrong[accepted], groups[accepted], settings.max_wrong)
    return replace(fitted, max_wrong=settings.max_wrong, confidence=found.confidence, known=least), found


def _given(limits: Limits, confidence: np.ndarray, known: np.ndarray) -> np.ndarray:
    """The answers (n,) to crops: one of ANSWERS each."""
    return np.array([limits.answer(*pair)["answer"] for pair in zip(confidence, known, strict=True)], dtype="<U7")


def _shares(given: np.ndarray) -> dict[str, Any]:
    share = {answer: float((given == answer).mean()) if len(given) else None for answer in ANSWERS}
    return {
        "num_samples": len(given),
        "coverage": share["code"],
        "unsure": share["unsure"],
        "unknown": share["unknown"],
    }


def _reason(limits: Limits, num_groups: int) -> str | None:
    """Why no pill is answered with a code."""
    if limits.confidence < np.inf:
        return None
    needed = fewest_answers(limits.max_wrong)
    shown = f"that at most {100 * limits.max_wrong:g} % of the codes are wrong"
    if num_groups < needed:
        return f"to show {shown} takes at least {needed:,} validated photo groups, and there are {num_groups:,}"
    return f"no confidence could be shown to be high enough {shown}"
