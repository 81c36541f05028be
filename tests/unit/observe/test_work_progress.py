"""Progress of counted work, on a terminal and without one."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from pillsnap.observe import work_progress
from pillsnap.observe.work_progress import progress_bar


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(work_progress.time, "monotonic", lambda: now[0])
    return now


def printed(clock: list[float], calls: list[tuple[float, tuple[Any, ...]]]) -> list[str]:
    out = io.StringIO()
    with progress_bar("evaluating", Console(file=out, width=200)) as progress:
        for seconds, call in calls:
            clock[0] += seconds
            progress(*call)
    return out.getvalue().splitlines()


def test_a_line_every_ten_seconds_says_rate_and_time_left(clock: list[float]) -> None:
    # The first call starts the count: what was done before, the start of processes among it, is no rate.
    calls = [(30.0, ("val photos", 16, 18_525))]
    calls += [(4.0, ("val photos", 16 + 400 * number, 18_525)) for number in range(1, 7)]
    assert printed(clock, calls) == [
        "evaluating: val photos  1,216 of 18,525  100/s  2:53 left",
        "evaluating: val photos  2,416 of 18,525  100/s  2:41 left",
    ]


def test_short_work_prints_nothing_and_long_work_its_end(clock: list[float]) -> None:
    assert printed(clock, [(1.0, (number, 5)) for number in range(1, 6)]) == []
    calls = [(0.0, (1, 3)), (9.0, (2, 3)), (5.0, (3, 3))]
    assert printed(clock, calls) == ["evaluating  3 of 3  7.0 s each"]


def test_each_phase_has_a_rate_of_its_own_and_an_unknown_total_no_end(clock: list[float]) -> None:
    calls = [(0.0, ("a", 0, 100)), (11.0, ("a", 100, 100)), (0.0, ("b", 5_000, 0)), (20.0, ("b", 7_000, 0))]
    assert printed(clock, calls) == ["evaluating: a  100 of 100  9/s", "evaluating: b  7,000  100/s"]


def test_a_bar_on_a_terminal_shows_the_same(clock: list[float]) -> None:
    out = io.StringIO()
    console = Console(file=out, width=120, force_terminal=True, legacy_windows=False)
    with progress_bar("evaluating", console) as progress:
        for _ in range(3):
            clock[0] += 2
            progress("val photos", int(clock[0] - 1000) * 50, 1_000)
    assert "evaluating: val photos" in out.getvalue() and "300/1000" in out.getvalue()
    assert "50/s  14 s left" in out.getvalue()
