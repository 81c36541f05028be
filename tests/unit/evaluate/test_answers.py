"""Answers are judged by limits that other groups chose; unknown pills judge, and never fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pillsnap.config.settings import EvaluationSettings
from pillsnap.evaluate import answers
from pillsnap.evaluate.answers import count_answers, fit_to_training, judge, part_of
from pillsnap.evaluate.inference import UNKNOWN
from pillsnap.evaluate.predictions import Predictions
from pillsnap.metrics.likeness import fit_likeness
from pillsnap.metrics.limits import Limits
from tests.unit.conftest import build_manifest

BOX = [0.0, 0.0, 10.0, 10.0]
NUM, GROUP = 4000, 2
BLANK = fit_likeness("sha", np.eye(3), np.arange(3))


def table(confidence: np.ndarray, known: np.ndarray, wrong: np.ndarray, label: int = 0, prefix: str = "p") -> pa.Table:
    """Crops of one class; the answer to a `wrong` one is another class."""
    return pa.table(
        {
            "sample_id": [f"{prefix}{number}" for number in range(len(confidence))],
            "label": np.full(len(confidence), label),
            "top_indices": [[int(each), 2] for each in wrong],
            "raw_confidence": confidence.astype(np.float32),
            "held_out_confidence": confidence.astype(np.float32),
            "known": known,
        }
    )


@pytest.fixture
def predictions() -> Predictions:
    """Answers of confidence c are wrong with the probability 0.2 (1 - c), alike in both crops of a group; unknown pills
    are as confident, and two standard deviations less alike.
    """
    rng = np.random.default_rng(0)
    confidence = np.repeat(rng.random(NUM // GROUP), GROUP)
    wrong = np.repeat(rng.random(NUM // GROUP), GROUP) < 0.2 * (1 - confidence)
    known = rng.normal(size=NUM)
    foreign = table(rng.random(500), rng.normal(size=500) - 2, np.ones(500, bool), UNKNOWN, "u")
    return Predictions(None, table(confidence, known, wrong), None, {}, unknown=foreign)


@pytest.fixture
def manifest() -> pa.Table:
    rows = [{"sample_id": f"p{i}", "group": f"g{i // GROUP}", "codes": ["K-1"], "boxes": [BOX]} for i in range(NUM)]
    return build_manifest(rows)


def test_risk_is_kept_on_crops_that_did_not_choose_it(predictions: Predictions, manifest: pa.Table) -> None:
    settings = EvaluationSettings(max_wrong=0.05)
    limits, found = judge(predictions, manifest, BLANK, settings)
    assert (limits.model, limits.max_wrong) == ("sha", 0.05) and limits.centres is BLANK.centres
    assert (found["threshold"], found["least_likeness"]) == (limits.confidence, limits.known)
    # Of answers from t on, 10 (1 - t) % are wrong: at most 5 % from 1/2 on.
    assert 0.5 < limits.confidence < 0.65
    assert limits.known == pytest.approx(-2.33, abs=0.15)  # a hundredth of a normal distribution
    assert (found["max_wrong"], found["level"], found["reason"]) == (0.05, 0.95, None)
    assert found["num_samples"] == NUM and found["unknown"] == pytest.approx(0.01, abs=0.004)
    assert found["coverage"] + found["unsure"] + found["unknown"] == pytest.approx(1)
    assert 0.3 < found["coverage"] < 0.5 and found["wrong"] <= 0.05 >= found["upper_bound"] > found["wrong"] * 0.8
    assert found["num_wrong"] == round(found["wrong"] * found["coverage"] * NUM)
    assert 0.01 < found["risk_coverage"]["aurc"] < found["risk_coverage"]["wrong"][-1] == pytest.approx(0.1, abs=0.02)
    left_out = found["left_out"]
    assert left_out["num_samples"] == 500
    assert left_out["auroc"] == pytest.approx(0.921, abs=0.02)  # two normal distributions, 2 apart
    assert left_out["auroc_softmax"] == pytest.approx(0.5, abs=0.04)
    assert left_out["unknown"] == pytest.approx(0.37, abs=0.06) == 1 - left_out["false_accepted"]

    # Other photos are judged with the limits as they are.
    other = replace(predictions, fitted_here=False)
    same, judged = judge(other, manifest, limits, settings)
    assert same is limits and judged["threshold"] == limits.confidence and judged["upper_bound"] is None
    confidence = predictions.classification["held_out_confidence"].to_numpy()  # type: ignore[index]
    known = predictions.classification["known"].to_numpy()  # type: ignore[index]
    given = (confidence >= limits.confidence) & (known >= limits.known)
    assert judged["coverage"] == given.mean()


def test_few_photos_give_no_code_and_say_so(predictions: Predictions, manifest: pa.Table) -> None:
    few = replace(
        predictions,
        classification=predictions.classification.slice(0, 400),  # type: ignore[union-attr]
        unknown=predictions.unknown.slice(0, 0),  # type: ignore[union-attr]
    )
    limits, found = judge(few, manifest, BLANK, EvaluationSettings())
    assert limits.confidence == np.inf and found["threshold"] is None and found["left_out"] is None
    assert found["reason"] == (
        "to show that at most 1 % of the codes are wrong takes at least 299 validated photo groups, and there are 200"
    )
    assert (found["coverage"], found["num_wrong"], found["wrong"]) == (0.0, 0, None)
    _, found = judge(predictions, manifest, BLANK, EvaluationSettings(max_wrong=0.0025))
    assert found["reason"] is not None and "no confidence could be shown" in found["reason"]


def test_pills_of_the_pipeline_are_counted() -> None:
    limits = replace(BLANK, max_wrong=0.01, confidence=0.8, known=0.0)
    pipeline = pa.table({"probs": [[0.9, 0.5], [], [0.8]], "known": [[1.0, 1.0], [], [-1.0]]})
    assert count_answers(limits, pipeline) == {"code": 1, "unsure": 1, "unknown": 1}


def test_likeness_is_fitted_to_training_photos_of_all_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"sample_id": f"{code}-{i}", "codes": [code], "boxes": [BOX], "split": "train" if i % 4 else "val"}
        for code, num in (("K-1", 40), ("K-2", 4), ("K-3", 40))
        for i in range(num)
    ]
    asked: dict[str, Any] = {}

    def infer(photos: pa.Table, *_: Any, **options: Any) -> list[dict[str, Any]]:
        asked.update(photos=photos, **options)
        labels = [int(codes[0][-1]) - 1 for codes in photos["codes"].to_pylist()]
        return [
            {"sample_id": photo, "label": [label], "features": [np.eye(3, dtype=np.float32)[label].tobytes()]}
            for photo, label in zip(photos["sample_id"].to_pylist(), labels, strict=True)
        ]

    monkeypatch.setattr(answers, "infer", infer)
    monkeypatch.setattr(answers, "MAX_FITTED", 30)

    class Run:
        manifest, codes = build_manifest(rows), ["K-1", "K-2", "K-3"]
        where = data_root = settings = None

    limits = fit_to_training(Run(), "sha")  # type: ignore[arg-type]
    assert limits is not None and isinstance(limits, Limits)
    assert (limits.model, limits.confidence, limits.known) == ("sha", np.inf, -np.inf)
    assert set(asked["photos"]["split"].to_pylist()) == {"train"}
    numbers = {code: asked["photos"]["codes"].to_pylist().count([code]) for code in Run.codes}
    assert numbers == {"K-1": 10, "K-2": 3, "K-3": 10}
    assert asked["detect"] is False and asked["features"] is True
    assert len(limits.centres) == 3
    assert part_of(Run.manifest, Run.codes, 1).num_rows == 3  # at least one of each
