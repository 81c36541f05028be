"""Interrupted and continued runs equal uninterrupted ones bit for bit, with the same ids and events."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pillsnap.runs.checkpoint import Position
from pillsnap.train.step import nonfinite
from tests.reliability.harness import LoopRun, same_state, say, tiny, train_two


@pytest.mark.parametrize("name", [pytest.param("detection", marks=pytest.mark.reliability), "classification"])
def test_run_interrupted_anywhere_equals_the_uninterrupted_one(
    name: str, toy_manifest: Path, toy_tree: Path, tmp_path: Path
) -> None:
    """Stopped at the end of every epoch and at five points within one (the first, the last, within validation...)."""
    settings = tiny(**{f"{name}__batch_size": 4})

    def run(where: str) -> LoopRun:
        return LoopRun(tmp_path / where, name, settings, toy_manifest, toy_tree)

    whole = run("whole")
    whole.train()
    plan, end = whole.plan, whole.last()
    assert end is not None and end.position.epoch == 3
    per_epoch = plan.train_steps + plan.val_steps + 1  # the loop also asks once after each epoch's checkpoint
    within = sorted({1, 2, plan.train_steps // 2, plan.train_steps, plan.train_steps + 1})
    assert len(within) == 5
    points = [[per_epoch], [2 * per_epoch], *[[per_epoch + step] for step in within], [1, 3, per_epoch, 2]]
    equal = 0
    for number, stops in enumerate(points):
        broken = run(f"broken-{number}")
        for stop in stops:
            position = broken.train(stop_at=lambda polls, stop=stop: polls == stop)
            assert position.epoch < 3
        broken.train()
        last = broken.last()
        assert last is not None
        assert same_state(end, last) == []
        assert broken.trained_ids == whole.trained_ids
        for kind in ("step", "epoch", "validation"):
            figures = [
                [(e["epoch"], e["step"], e.get("loss"), e.get("metrics")) for e in r.events(kind)]
                for r in (whole, broken)
            ]
            assert figures[0] == figures[1], kind
        equal += 1
    say(equal, len(points), f"{name}: interrupted and continued equals uninterrupted bit for bit")


@pytest.mark.parametrize("name", [pytest.param("detection", marks=pytest.mark.reliability), "classification"])
def test_run_with_short_epochs_interrupted_anywhere_equals_the_uninterrupted_one(
    name: str, toy_manifest: Path, toy_tree: Path, tmp_path: Path
) -> None:
    """Epochs of 10 samples end within permutations; epochs 2, 4 and the last, 5, are validated, on 6 samples."""
    overrides = {"epochs": 5, "batch_size": 4, "samples_per_epoch": 10, "validation_samples": 6, "validate_every": 2}
    if name == "detection":
        overrides["combination_share"] = 0.5
    settings = tiny(**{f"{name}__{key}": value for key, value in overrides.items()})

    def run(where: str) -> LoopRun:
        return LoopRun(tmp_path / where, name, settings, toy_manifest, toy_tree)

    whole = run("whole")
    whole.train()
    end = whole.last()
    assert end is not None and end.position == Position(5, 0, 15)
    assert [event["epoch"] for event in whole.events("validation")] == [2, 4, 5]
    assert [event["epoch"] for event in whole.events("epoch")] == [1, 2, 3, 4, 5]
    assert whole.plan.num_val == 6 < (whole.samples.num_val or 0)
    for number, stops in enumerate([[2], [5], [9, 1, 3, 4]]):
        broken = run(f"broken-{number}")
        for stop in stops:
            broken.train(stop_at=lambda polls, stop=stop: polls == stop)
        broken.train()
        last = broken.last()
        assert last is not None and same_state(end, last) == []
        assert broken.trained_ids == whole.trained_ids
        metrics = [[(e["epoch"], e["metrics"], e["best"]) for e in r.events("validation")] for r in (whole, broken)]
        assert metrics[0] == metrics[1]


def test_float16_run_continues_with_its_loss_scale(
    toy_manifest: Path, toy_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The initial scale is too large: overflows skip steps but do not end the run, however often it is interrupted."""
    monkeypatch.setattr(nonfinite, "_FIRST_SCALE", 2.0**22)
    monkeypatch.setattr(nonfinite, "_GROW_AFTER", 3)
    settings = tiny(classification__batch_size=4, train__amp="float16")

    def run(where: str) -> LoopRun:
        return LoopRun(tmp_path / where, "classification", settings, toy_manifest, toy_tree)

    whole, broken = run("whole"), run("broken")
    whole.train()
    for stop in (2, 9):
        assert broken.train(stop_at=lambda polls, stop=stop: polls == stop).epoch < 3
    broken.train()
    end, last = whole.last(), broken.last()
    assert end is not None and last is not None
    assert same_state(end, last) == []
    assert whole.events("warning") == broken.events("warning") == []
    scale = end.trainer_state()["loss_scale"]
    steps = float(end.trainer_state()["optimizer"]["state"][0]["step"])
    assert 1 < float(scale["factor"]) < 2.0**22 and 3 < steps < end.position.global_step
    assert all(torch.isfinite(value).all() for value in end.weights("model").values())
    say(1, 1, f"float16: {end.position.global_step - steps:.0f} overflows of {end.position.global_step} steps")


@pytest.mark.reliability
def test_two_compiled_workers_interrupted_equal_uninterrupted_ones(
    toy_manifest: Path, toy_tree: Path, tmp_path: Path
) -> None:
    """Also when the interruption makes steps careful that overlapped with communication before."""
    settings = tiny(
        train__compile="on", train__amp="off", classification__epochs=2, classification__batch_size=4,
        classification__drop_rate=0.5,
    )  # fmt: skip

    def train(where: str, **faults: int) -> LoopRun:
        ends = train_two(tmp_path / where, "classification", settings, toy_manifest, toy_tree, faults)
        assert [end["error"] for end in ends] == ["", ""]
        return LoopRun(tmp_path / where, "classification", settings, toy_manifest, toy_tree, num_workers=2)

    whole = train("whole")
    for stop in (2, 5):  # during the careful steps after a start, and after them
        stopped = train("broken", stop_at_poll=stop).last()
        assert stopped is not None and stopped.position.epoch < 2
    broken = train("broken")
    end, last = whole.last(), broken.last()
    assert end is not None and last is not None and end.position.epoch == 2
    assert same_state(end, last) == []
    losses = [[(e["epoch"], e["step"], e["loss"]) for e in run.events("step")] for run in (whole, broken)]
    assert losses[0] == losses[1]
    assert not [e for run in (whole, broken) for e in run.events("warning") if "not compiled" in e["message"]]
    say(1, 1, f"two compiled workers: stopped twice and continued equals uninterrupted over {len(losses[0])} steps")
