from __future__ import annotations

import io

import pytest
from rich.console import Console

from pillsnap.errors import UserError
from pillsnap.evaluate.targets import check_targets, duration, results_table

METRICS = {
    "split": "val",
    "detection": {"map50": 0.5, "map50_95": 0.4},
    "classification": {"top1": 0.9, "top5": 0.99, "macro_f1": 0.88},
    "pipeline": {"pill_accuracy": 0.8, "photo_accuracy": 0.6},
    "total_time_s": 100.0,
}


def test_accuracy_must_reach_its_target_and_time_must_stay_within() -> None:
    results, misses = check_targets(METRICS, {"top1": 0.9, "map50": 0.5, "total_time_s": 100})
    assert [entry["met"] for entry in results.values()] == [True, True, True]
    assert misses == []
    assert results["top1"] == {"target": 0.9, "value": 0.9, "met": True}


def test_top5_is_a_target() -> None:
    results, misses = check_targets(METRICS, {"top5": 0.99})
    assert results == {"top5": {"target": 0.99, "value": 0.99, "met": True}} and misses == []
    results, misses = check_targets(METRICS, {"top5": 0.995})
    assert misses == ["Classification top-5 is 99.00 %, below the target of 99.50 %."]
    text = shown({**METRICS, "targets": results, "met": False, "misses": misses})
    assert text.count("Classification top-5") == 1


def test_missed_target_gives_one_line_with_both_values() -> None:
    results, misses = check_targets(METRICS, {"top1": 0.901, "map50": 0.51, "total_time_s": 99})
    assert [entry["met"] for entry in results.values()] == [False, False, False]
    assert misses == [
        "Classification top-1 is 90.00 %, below the target of 90.10 %.",
        "Detection mAP@0.5 is 50.00 %, below the target of 51.00 %.",
        "Total time is 1 min 40 s, above the target of 1 min 39 s.",
    ]


def test_task_that_was_not_evaluated_misses_its_target() -> None:
    metrics = {**METRICS, "detection": None, "total_time_s": None}
    results, misses = check_targets(metrics, {"map50": 0.3, "total_time_s": 9})
    assert results["map50"] == {"target": 0.3, "value": None, "met": False}
    assert "detection task was not evaluated" in misses[0]
    assert "unknown" in misses[1]


def test_no_target_and_unknown_target() -> None:
    assert check_targets(METRICS, {"top1": None}) == ({}, [])
    with pytest.raises(UserError, match=r"top_1.*top1, top5, map50, total_time_s"):
        check_targets(METRICS, {"top_1": 0.9})


def shown(metrics: dict) -> str:
    console = Console(width=110, record=True, file=io.StringIO())
    console.print(results_table(metrics))
    return console.export_text()


def test_results_table_has_split_and_targets() -> None:
    results, misses = check_targets(METRICS, {"top1": 0.85, "map50": 0.6})
    text = shown({**METRICS, "targets": results, "met": not misses, "misses": misses})
    assert "targets missed (val split)" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["Classification", "top-1", "90.00", "%", "≥", "85.00", "%", "yes"] in rows
    assert ["Detection", "mAP@0.5", "50.00", "%", "≥", "60.00", "%", "no"] in rows
    assert ["End", "to", "end,", "pills", "correct", "80.00", "%"] in rows
    assert misses == ["Detection mAP@0.5 is 50.00 %, below the target of 60.00 %."]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3.21, "3.2 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7080, "1 h 58 min"), (7199, "2 h 00 min")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
