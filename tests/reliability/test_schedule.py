"""The decay that begins early, the time budget, and runs that are extended: equal to the bit, within the time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pillsnap.runs.checkpoint import Checkpoint, find_checkpoint
from pillsnap.runs.extension import extend, is_trained
from tests.reliability.harness import LoopRun, same_state, tiny

WSD = {"train__schedule": "wsd", "train__decay_share": 0.25, "classification__batch_size": 4}

Runs = Callable[..., LoopRun]


@pytest.fixture
def runs(toy_manifest: Path, toy_tree: Path, tmp_path: Path) -> Runs:
    def run(where: str, name: str = "classification", **settings: Any) -> LoopRun:
        return LoopRun(tmp_path / where, name, tiny(**WSD | settings), toy_manifest, toy_tree)

    return run


def end_of(run: LoopRun) -> Checkpoint:
    last = run.last()
    assert last is not None and is_trained(last, run.plan.epochs)
    return last


@pytest.mark.parametrize("name", ["classification", pytest.param("detection", marks=pytest.mark.reliability)])
def test_extended_run_equals_the_one_planned_so(runs: Runs, name: str) -> None:
    short, planned = {f"{name}__epochs": 4}, {f"{name}__epochs": 6}
    whole, extended = runs("whole", name, **planned), runs("extended", name, **short)
    whole.train()
    extended.train()
    assert end_of(extended).position.epoch == 4
    longer = runs("extended", name, **planned)
    notes = extend(str(longer.run_dir), extended.settings, longer.settings)
    assert "goes on from step-" in notes[0] and "before its decay" in notes[0]
    longer.train()
    assert same_state(end_of(whole), end_of(longer)) == []
    for kind in ("step", "epoch", "validation", "decay"):
        figures = [
            [(e["epoch"], e["step"], e.get("loss"), e.get("lr"), e.get("metrics"), e.get("num_steps")) for e in events]
            for events in (whole.events(kind), longer.events(kind))
        ]
        assert figures[0] == figures[1] and figures[0], kind
    best = [find_checkpoint(run.folder, "best")[0] for run in (whole, longer)]
    assert best[0] is not None and best[1] is not None and same_state(best[0], best[1]) == []
