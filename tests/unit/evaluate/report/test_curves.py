"""Learning curves and times of runs in which not every epoch was validated."""

from __future__ import annotations

import pytest

from pillsnap.evaluate.report.curves import learning_curves
from pillsnap.evaluate.report.run_summary import time_breakdown
from tests.unit.evaluate.report.test_page import events


@pytest.mark.parametrize(("validated", "charts"), [([1, 2, 3, 4], 3), ([3], 3), ([], 2)])
def test_curves_and_times_of_epochs_without_validation(validated: list[int], charts: int) -> None:
    found = [e for e in events() if e["kind"] != "validation" or e["epoch"] in validated]
    drawn = learning_curves(found)
    assert drawn is not None
    assert [len(drawn["charts"][task]) for task in ("detection", "classification")] == [charts, charts]
    parts = {name: seconds for name, seconds, *_ in time_breakdown({"total_time_s": 400.0}, found)["parts"]}
    assert (parts["Detection: training"], parts["Detection: validation"]) == (60.0, 5.0 * len(validated))
