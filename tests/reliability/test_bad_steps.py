"""A non-finite step makes no update and no checkpoint; three in a row end the run, naming steps and samples."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pillsnap.errors import UserError
from pillsnap.train.step import device_readback
from pillsnap.train.step.training_state import TrainingState, _Losses
from tests.reliability.harness import LoopRun, inject, say, tiny, train_two


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> dict:
    monkeypatch.setattr(TrainingState, "step", TrainingState.step)
    monkeypatch.setattr(_Losses, "forward", _Losses.forward)
    faults: dict = {}
    inject(faults, 0)
    return faults


@pytest.mark.parametrize("lag", [0, 2])
def test_bad_steps_are_skipped_and_not_checkpointed(
    lag: int, faults: dict, toy_manifest: Path, toy_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results are read at once (CPU) or two steps later (GPU)."""
    monkeypatch.setattr(device_readback, "lag_steps", lambda device: lag)

    def run(where: str) -> LoopRun:
        return LoopRun(tmp_path / where, "classification", tiny(classification__epochs=1), toy_manifest, toy_tree)

    before, through = run("before"), run("through")
    before.train(stop_at=lambda polls: polls == 2)
    faults["nan_steps"] = [3, 3]
    position = through.train(stop_at=lambda polls: polls == 3)  # at a bad step: the stop waits for a good one
    assert position.global_step != 3
    faults["nan_steps"] = [3, 4]
    at_end = run("at_end")
    at_end.train(stop_at=lambda polls: polls == 2)
    start, kept = before.last(), at_end.last()
    assert start and kept
    assert all(torch.equal(value, kept.weights("model")[name]) for name, value in start.weights("model").items())
    at_end.train()
    warnings = [event["message"] for event in at_end.events("warning")]
    assert [text.split("step ")[1].split(":")[0] for text in warnings] == ["3", "4"]
    assert {event["step"] for event in at_end.events("checkpoint")} == {2, at_end.plan.train_steps}
    assert all(torch.isfinite(value).all() for value in at_end.last().weights("model").values())  # type: ignore[union-attr]


@pytest.mark.parametrize("lag", [0, 2])
def test_three_bad_steps_end_the_run_with_their_samples(
    lag: int, faults: dict, toy_manifest: Path, toy_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_readback, "lag_steps", lambda device: lag)
    run = LoopRun(tmp_path / "run", "classification", tiny(), toy_manifest, toy_tree)
    run.train(stop_at=lambda polls: polls == 1)
    faults["nan_steps"] = [2, 99]
    with pytest.raises(UserError) as raised:
        run.train()
    text = str(raised.value)
    last = run.last()
    assert last is not None and last.position.global_step == 1
    ids = run.samples.train["sample_id"].take(run.trained_ids[1][2]).to_pylist()
    assert "step 2: " in text and all(sample_id in text for sample_id in ids)
    assert "stopped at step 4: 3 steps in a row" in text and "step 5: " not in text
    say(1, 1, "NaN from step 2 on: no update, no checkpoint, the error names step 2 and its samples")


def test_bad_step_of_one_worker_lists_the_samples_of_all(toy_manifest: Path, toy_tree: Path, tmp_path: Path) -> None:
    settings = tiny(classification__epochs=1)
    ends = train_two(
        tmp_path / "run", "classification", settings, toy_manifest, toy_tree, {"nan_steps": [2, 99], "nan_rank": 1}
    )
    run = LoopRun(tmp_path / "run", "classification", settings, toy_manifest, toy_tree)
    assert run.last() is None
    named = run.samples.train["sample_id"].take([i for end in ends for i in end["ids"][1][2]]).to_pylist()
    assert len(named) == 8
    for end in ends:
        assert "step 2: " in end["error"] and all(sample_id in end["error"] for sample_id in named)
    say(2, 2, "NaN on one of two workers: both end with the same error and the samples of both")
