"""Metrics of restricted answers count the same pills with and without the restriction."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from pillsnap.errors import UserError
from pillsnap.evaluate import restricted
from pillsnap.evaluate.predictions import Predictions
from tests.unit.conftest import build_crops, build_manifest, build_pipeline

CODES = ["K-1", "K-2", "K-3"]
BOX = [0.0, 0.0, 10.0, 10.0]


def run_of(manifest: pa.Table) -> Any:
    return SimpleNamespace(enrolled=None, codes=CODES, manifest=manifest, where="run", settings=None, data_root="")


def test_same_pills_with_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [("a", ["K-1"]), ("b", ["K-2"]), ("c", ["K-3"]), ("d", ["K-1", "K-2"]), ("e", ["K-2", "K-3"])]
    boxes = [BOX, [50.0, 50.0, 10.0, 10.0]]
    manifest = build_manifest(
        [{"sample_id": name, "codes": codes, "boxes": boxes[: len(codes)]} for name, codes in rows]
    )
    # The photo alone takes K-2 for K-3.
    before = predictions({"K-1": 0, "K-2": 2, "K-3": 2}, rows, boxes)
    asked: dict[str, Any] = {}

    def predict(photos: pa.Table, *_: Any, evidence: Any, **__: Any) -> Predictions:
        names = photos["sample_id"].to_pylist()
        asked.update(names=names, num_allowed=evidence.num_allowed, ratios=evidence.log_ratios.tolist())
        return predictions({"K-1": 0, "K-2": 1, "K-3": 0}, [row for row in rows if row[0] in names], boxes)

    monkeypatch.setattr(restricted, "predict_manifest", predict)
    found = restricted.restricted_metrics(run_of(manifest), manifest, ["K-2", "K-1"], before, "val")
    assert asked == {"names": ["a", "b", "d", "e"], "num_allowed": 2, "ratios": [0, 0, -float("inf")]}
    assert found["num_codes"] == 2
    named = found["classification"]
    # K-1 of a and d, K-2 of b, d and e: the pills of K-3 are not counted.
    assert (named["restricted"]["top1"], named["restricted"]["num_samples"]) == (1.0, 5)
    assert (named["unrestricted"]["top1"], named["unrestricted"]["num_samples"]) == (2 / 5, 5)
    # Photo d alone shows only possible codes.
    chained = found["pipeline"]
    assert [chained[name]["num_photos"] for name in ("restricted", "unrestricted")] == [1, 1]
    assert [chained[name]["pill_accuracy"] for name in ("restricted", "unrestricted")] == [1.0, 0.5]
    with pytest.raises(UserError, match="No photo of the split 'val' shows one of the 1 codes"):
        restricted.restricted_metrics(run_of(manifest), manifest.slice(0, 1), ["K-3"], before, "val")


def predictions(answers: dict[str, int], rows: list[tuple[str, list[str]]], boxes: list[list[float]]) -> Predictions:
    pills = [code for _, codes in rows for code in codes]
    crops = build_crops([CODES.index(code) for code in pills], [[answers[code]] for code in pills])
    named = build_pipeline(
        [(name, boxes[: len(codes)], [0.9] * len(codes), [answers[code] for code in codes]) for name, codes in rows]
    )
    return Predictions(None, crops, named, {})
