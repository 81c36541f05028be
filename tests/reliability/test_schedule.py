"""The decay that begins early, the time budget, and runs that are extended: equal to the bit, within the time."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pillsnap.config import load_settings
from pillsnap.errors import UserError
from pillsnap.observe.events import read_events
from pillsnap.runs.checkpoint import Checkpoint, Position, find_checkpoint
from pillsnap.runs.directory import open_run
from pillsnap.runs.extension import awaits_validation, extend, is_trained
from pillsnap.train.budget_clock import BudgetClock
from pillsnap.train.driver import train_run
from tests.conftest import ROOT
from tests.reliability.budgets import (
    BUDGET_S,
    DECISION,
    EPOCHS,
    KILLS,
    PLAN,
    SLOW,
    START_S,
    STEPS,
    VALIDATION_STEP_S,
    SimulatedRun,
)
from tests.reliability.harness import LoopRun, same_state, say, tiny, train_two

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


@pytest.mark.parametrize(("slowness", "epochs"), [(1.0, 20), (3.0, 7), (10.0, 2)])
def test_run_ends_within_its_budget_with_the_decay_done(slowness: float, epochs: int, tmp_path: Path) -> None:
    run = SimulatedRun(tmp_path, slowness)
    assert run.train() == Position(epochs, 0, epochs * STEPS)
    (first, *_, told), (decay,) = [*run.events("budget")] * 2, run.events("decay")
    assert first["step"] == 4 and (first["epoch"], first["planned_epochs"]) == (1, EPOCHS)
    assert told["epochs_fitting"] == epochs
    assert decay["reason"] == ("planned" if epochs == EPOCHS else "budget") and decay["end_epoch"] == epochs
    assert decay["num_steps"] == round(0.2 * epochs * STEPS) and decay["step"] == told["decay_step"]
    rates = [event["lr"] for event in run.events("step")]
    assert rates[decay["step"]] == 0.01 > rates[decay["step"] + 1] and rates[-1] < 0.01 * (0.1 + 0.3)
    evaluation_s = 2 * slowness * VALIDATION_STEP_S
    assert run.now_s + evaluation_s <= BUDGET_S
    assert run.last().meta["elapsed_s"] == run.now_s and is_trained(run.last(), EPOCHS)
    assert first["epochs_fitting"] <= epochs and run.now_s > 0.8 * BUDGET_S
    say(1, 1, f"1/{slowness:.0f} of the speed: {epochs} of {EPOCHS} epochs in {run.now_s:.0f} of {BUDGET_S:.0f} s")


def test_budget_without_a_rate_decides_nothing(tmp_path: Path) -> None:
    """The cosine, and `wsd` without a limit, go through all epochs and write no such event."""
    for number, train in enumerate(({"schedule": "cosine"}, {"time_budget_minutes": None})):
        run = SimulatedRun(tmp_path / str(number), 50.0, **train)
        run.budget = None
        assert run.train().epoch == EPOCHS and run.events("budget") == []
        assert [event["reason"] for event in run.events("decay")] == ["planned"] * number


def test_run_ends_with_a_validated_epoch(tmp_path: Path) -> None:
    """A validation follows every third epoch, which takes a part of the samples."""
    plan = replace(PLAN, samples_per_epoch=20, num_train=90, validate_every=3)
    slow = SimulatedRun(tmp_path / "slow", 6.0, plan=plan)
    assert slow.train() == Position(6, 0, 30) and slow.now_s <= BUDGET_S
    assert [event["epoch"] for event in slow.events("validation")] == [3, 6]
    assert slow.events("decay")[0]["step"] == 24 and is_trained(slow.last(), EPOCHS)
    tired = SimulatedRun(tmp_path / "tired", 1.0, plan=plan, patience=1)
    end = tired.train()
    (decay,) = tired.events("decay")
    assert decay["reason"] == "patience" and decay["step"] % 15 == 0 and end.epoch % 3 == 0
    assert tired.events("validation")[-1]["epoch"] == end.epoch == decay["end_epoch"] > decay["step"] // 5


def test_epochs_and_limits_of_the_stages_end_in_time_on_any_machine(tmp_path: Path) -> None:
    """18 epochs of which every third is validated, schedule and share of the decay as in the preset of stage 3."""
    preset = load_settings("stage3")
    own, train = preset.classification, preset.train
    plan = replace(PLAN, epochs=own.epochs, samples_per_epoch=40, validate_every=own.validate_every)
    ends, refused = {}, set()
    speeds = (0.5, 1.0, 2.0, 3.0, 5.0, 7.0, 9.0, 20.0, 100.0)
    for slowness in speeds:
        run = SimulatedRun(
            tmp_path / str(slowness), slowness, plan=plan, schedule=train.schedule, decay_share=train.decay_share
        )
        try:
            ends[slowness] = run.train().epoch
        except UserError:
            refused.add(slowness)
            assert run.events("checkpoint") == [] and run.events("step")[-1]["step"] <= 4
            continue
        assert run.now_s + 2 * slowness * VALIDATION_STEP_S <= BUDGET_S
        assert run.events("step")[-1]["lr"] < 0.01 * 0.4 and run.events("decay")[-1]["share"] >= 0.19
    assert ends == {0.5: 18, 1.0: 18, 2.0: 12, 3.0: 6, 5.0: 3, 7.0: 3} and refused == {9.0, 20.0, 100.0}
    say(len(speeds), len(speeds), "speeds at which the schedule of stage 3 ends in time or is refused at once")


def test_decay_is_shortened_when_the_machine_slows_down(tmp_path: Path) -> None:
    run = SimulatedRun(tmp_path, 1.0)
    run.slower_from = {163: 3.0}
    end = run.train()
    planned, *shortened = run.events("decay")
    assert (planned["step"], planned["reason"]) == (160, "planned") and shortened
    assert {event["reason"] for event in shortened} == {"budget"} and end.epoch == shortened[-1]["end_epoch"] < EPOCHS
    assert run.now_s + 2 * 3 * VALIDATION_STEP_S <= BUDGET_S
    rates = [event["lr"] for event in run.events("step") if event["step"] > 160]
    assert rates == sorted(rates, reverse=True) and rates[-1] < 0.01 * 0.35


@pytest.mark.parametrize(("slower", "epochs"), [(61, 9), (75, 9), (96, 12)])
def test_machine_that_slows_down_between_validations_ends_in_time(
    slower: int, epochs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four times slower from a step on, when no third epoch can be reached any more: training ends between two
    validations, with its decay, and a second start validates.
    """
    monkeypatch.setattr("pillsnap.train.budget_clock._RESTART_S", START_S)
    preset = load_settings("stage3")
    plan = replace(PLAN, epochs=18, samples_per_epoch=40, validate_every=3)
    run = SimulatedRun(tmp_path, 2.0, plan=plan, decay_share=preset.train.decay_share)
    run.slower_from = {slower: 8.0}
    cut = run.train()
    assert cut.epoch == epochs - 1 and cut.epoch_step == STEPS and slower < cut.global_step < epochs * STEPS
    assert awaits_validation(run.last(), 18) and [e["epoch"] for e in run.events("validation")][-1] < epochs
    assert run.train(stop_at=lambda polls: polls == 1) == cut
    assert run.train() == Position(epochs, 0, cut.global_step) and is_trained(run.last(), 18)
    assert run.events("validation")[-1]["epoch"] == epochs and run.events("epoch")[-1]["epoch"] == epochs
    rates = [event["lr"] for event in run.events("step")]
    assert len(rates) == cut.global_step and rates[-1] < 0.01 * 0.35 and run.events("decay")[-1]["end_epoch"] == epochs
    # A step takes 8 s; the stop in the validation took a start.
    used_s = run.last().meta["elapsed_s"] - START_S + 2 * 8 * VALIDATION_STEP_S
    assert used_s <= BUDGET_S + 8
    say(1, 1, f"4 times slower from step {slower} on: {used_s:.0f} of {BUDGET_S:.0f} s")


@pytest.mark.usefixtures("ray_local")
def test_second_start_validates_alone(
    toy_manifest: Path, toy_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped within a decay that ends after 12 steps, in the second of three epochs before a validation: under Ray,
    one command trains to its end and validates, as the loop does by two starts.
    """
    name = "classification"
    settings = tiny(train__task=name, **WSD, classification__epochs=6, classification__validate_every=3)
    run, _ = open_run(tmp_path / "run", settings, toy_manifest, toy_tree)
    loop = LoopRun(run.run_dir, name, settings, toy_manifest, toy_tree)
    with monkeypatch.context() as patched:
        patched.setattr(BudgetClock, "end_step", lambda _, position, __: 12 * (position.global_step == 8))
        assert loop.train(stop_at=lambda polls: polls == 9) == Position(0, 9, 9)
    shutil.copytree(run.run_dir, tmp_path / "alone")
    alone = LoopRun(tmp_path / "alone", name, settings, toy_manifest, toy_tree)
    assert (alone.train(), alone.train()) == (Position(2, 10, 12), Position(3, 0, 12))
    train_run(run)
    last, _ = find_checkpoint(run.checkpoint_dir(name))
    assert last is not None and last.position == Position(3, 0, 12) and is_trained(last, 6)
    # With another number of threads, sums are rounded otherwise.
    losses = [[event["loss"] for event in each.events("step")] for each in (loop, alone)]
    assert len(losses[0]) == 12 and losses[0] == pytest.approx(losses[1], rel=1e-3)
    (validation,), (expected,) = loop.events("validation"), alone.events("validation")
    assert validation["metrics"] == pytest.approx(expected["metrics"], rel=1e-2) and validation["epoch"] == 3
    assert run.export_path(name).exists()


def test_budget_too_small_for_warm_up_and_decay_is_refused(tmp_path: Path) -> None:
    run = SimulatedRun(tmp_path, 25.0)
    with pytest.raises(UserError, match=r"train\.time_budget_minutes is too small for classification on this machine"):
        run.train()
    assert run.now_s < 0.4 * BUDGET_S and run.events("checkpoint") == []


def test_killed_anywhere_the_run_ends_as_the_uninterrupted_one(tmp_path: Path) -> None:
    whole = SimulatedRun(tmp_path / "whole", SLOW)
    whole.train()
    (decision,) = whole.events("decay")
    assert decision["step"] == DECISION
    subprocess.run([sys.executable, "-m", "tests.reliability.budgets", str(tmp_path)], check=True, cwd=ROOT)
    equal = 0
    for name in KILLS:
        run = SimulatedRun(tmp_path / name, SLOW)
        (again,) = run.events("decay")
        assert {k: again[k] for k in again if k != "time"} == {k: decision[k] for k in decision if k != "time"}, name
        assert same_state(whole.last(), run.last()) == [], name
        equal += 1
    say(equal, len(KILLS), "killed around the decision: equal to the uninterrupted run bit for bit")


def test_run_that_the_budget_ended_is_extended_with_a_larger_one(tmp_path: Path) -> None:
    """It goes on from the decision; the clock that decided then cannot decide again."""
    large_s, name = 10 * BUDGET_S, "classification"
    short, whole = SimulatedRun(tmp_path / "short", SLOW), SimulatedRun(tmp_path / "whole", SLOW, large_s)
    assert (short.train().epoch, whole.train().epoch) == (7, EPOCHS)
    small, large = (
        load_settings(
            "demo", {"train.schedule": "wsd", "train.time_budget_minutes": limit_s / 60, f"{name}.epochs": 20}
        )
        for limit_s in (BUDGET_S, large_s)
    )
    more = large.model_copy(update={name: large.classification.model_copy(update={"epochs": 30})})
    unlimited = small.model_copy(update={name: more.classification})
    with pytest.raises(UserError, match=r"because of train\.time_budget_minutes, .* set .* higher or to null as well"):
        extend(str(short.run_dir), small, unlimited)
    assert extend(str(short.run_dir), small, small) == [] and short.last().position.epoch == 7
    assert extend(str(short.run_dir), small, large) == [f"{name} goes on from step-{DECISION:08d}, before its decay"]
    assert short.last().position.global_step == DECISION
    longer = SimulatedRun(tmp_path / "short", SLOW, large_s)
    assert longer.train().epoch == EPOCHS
    assert same_state(whole.last(), longer.last()) == []


def test_patience_ends_a_run_alike_when_interrupted(tmp_path: Path) -> None:
    options: dict[str, Any] = {"time_budget_minutes": None, "patience": 2}
    whole, broken = SimulatedRun(tmp_path / "whole", 1.0, **options), SimulatedRun(tmp_path / "broken", 1.0, **options)
    whole.budget = broken.budget = None
    end = whole.train()
    (decay,) = whole.events("decay")
    best = [event["epoch"] for event in whole.events("validation") if event["best"] and event["step"] <= decay["step"]]
    assert decay["reason"] == "patience" and decay["step"] == STEPS * (best[-1] + 2)
    assert end.epoch == decay["end_epoch"] < EPOCHS and decay["share"] >= 0.19
    for stop in (40, 33 * decay["step"] // STEPS, 20, 1):
        broken.train(stop_at=lambda polls, stop=stop: polls == stop)
    broken.train()
    assert same_state(whole.last(), broken.last()) == [] and len(broken.events("decay")) == 1


def test_clock_of_rank_0_decides_for_all_workers(toy_manifest: Path, toy_tree: Path, tmp_path: Path) -> None:
    """By the real clock: of 400 epochs, 12 s allow a few."""
    settings = tiny(
        **WSD, classification__epochs=400, classification__warmup_epochs=0.5, train__time_budget_minutes=0.2
    )
    ends = train_two(tmp_path, "classification", settings, toy_manifest, toy_tree, {"step_pause_s": 0.05})
    assert [end["error"] for end in ends] == ["", ""]
    last, events = find_checkpoint(tmp_path / "checkpoints" / "classification")[0], read_events(tmp_path)
    assert last is not None and is_trained(last, 400) and last.position.epoch < 400
    decays = [event for event in events if event["kind"] == "decay"]
    assert {event["reason"] for event in decays} == {"budget"} and decays[-1]["end_epoch"] == last.position.epoch
    places = [[(epoch, step) for epoch, step, _ in end["ids"] if epoch < last.position.epoch] for end in ends]
    assert places[0] == places[1] and places[0][-1][0] == last.position.epoch - 1
