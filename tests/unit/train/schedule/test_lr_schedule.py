"""Learning rate over a run: cosine, and warm-up, stable, decay with its early end."""

from __future__ import annotations

import math
from typing import Any

import pytest

from pillsnap.config import ClassificationSettings, TrainSettings
from pillsnap.data.plan import StreamPlan
from pillsnap.runs.checkpoint import Position
from pillsnap.train.schedule.lr_schedule import Schedule


def schedule(
    epochs: int = 11,
    *,
    final: float = 0.1,
    warmup_epochs: float = 1.0,
    independent: int | None = None,
    step: int = 0,
    progress: dict[str, Any] | None = None,
    validate_every: int = 1,
    **train: Any,
) -> Schedule:
    """Epochs of ten steps, peak learning rate 1."""
    plan = StreamPlan(
        seed=0, epochs=epochs, num_train=40, num_val=4, batch_size=4, num_workers=1, validate_every=validate_every
    )
    task = ClassificationSettings(epochs=epochs, lr=1.0, warmup_epochs=warmup_epochs, final_lr_fraction=final)
    settings = TrainSettings(**train)
    return Schedule(plan, task, settings, epochs if independent is None else independent, step, progress or {})


def wsd(epochs: int = 10, **options: Any) -> Schedule:
    return schedule(epochs, schedule="wsd", **options)


def rates(made: Schedule, num_steps: int) -> list[float]:
    return [made.lr(step) for step in range(num_steps)]


def test_warm_up_then_half_a_cosine() -> None:
    found = rates(schedule(), 110)
    assert found[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert found[10] == pytest.approx(1.0)
    assert found[60] == pytest.approx(0.55)
    assert found[-1] == pytest.approx(0.1, abs=1e-3)
    assert found[10:] == sorted(found[10:], reverse=True)
    assert schedule(10, warmup_epochs=0, final=0.01).lr(500) == pytest.approx(0.01)
    assert (schedule().progress, schedule().meta, schedule().end_epoch) == ({}, {}, 11)


def test_warm_up_stable_decay() -> None:
    """Of 100 steps, 10 warm up, 70 are stable and 20 decay as 1 - sqrt, to a tenth."""
    found = rates(wsd(), 100)
    assert found[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert found[10:81] == [1.0] * 71
    assert found[85] == pytest.approx(0.1 + 0.9 * (1 - math.sqrt(5 / 20)))
    assert found[99] == pytest.approx(0.1 + 0.9 * (1 - math.sqrt(19 / 20)))
    assert wsd().lr(100) == pytest.approx(0.1)


def test_until_the_decay_more_epochs_change_nothing() -> None:
    short, long = wsd(10), wsd(15)
    assert short.branch_step == 80 and long.branch_step == 120
    assert rates(short, 80) == rates(long, 80)
    assert wsd(10, independent=7).branch_step == 70  # as mosaic ends then
    assert wsd(10, independent=0).branch_step == 0


def test_shortest_decay_is_one_step() -> None:
    made = wsd(1, decay_share=0.01, warmup_epochs=0.0)
    assert (made.decay_start(10), made.lr(8), made.lr(9), made.lr(10)) == (9, 1.0, 1.0, pytest.approx(0.1))


def test_warm_up_ends_where_the_decay_begins() -> None:
    """A single epoch warms up over 8 of its 10 steps. In a longer run it would take all 10: the two have no step in
    common.
    """
    made = wsd(1)
    assert rates(made, 9) == pytest.approx([*(0.125 * (i + 1) for i in range(8)), 1.0])
    assert made.lr(9) == pytest.approx(0.1 + 0.9 * (1 - math.sqrt(1 / 2)))
    assert (made.warmup_steps, made.branch_step) == (8, 0)
    assert (wsd(2).warmup_steps, wsd(2).branch_step) == (10, 16)


def test_early_end_keeps_its_share_of_the_steps() -> None:
    made = wsd()
    made.end_early(42, 50, "budget")
    assert (made.end_epoch, made.decays(41), made.decays(42), made.branch_step) == (5, False, True, 42)
    facts = {"reason": "budget", "end_epoch": 5, "planned_epochs": 10, "num_steps": 8, "share": 0.16}
    assert made.decay_facts() == facts
    assert made.lr(41) == made.lr(42) == 1.0 and made.lr(44) == pytest.approx(0.1 + 0.9 * (1 - math.sqrt(2 / 8)))


def test_decay_is_shortened_from_the_rate_it_has() -> None:
    made = wsd(final=0.0)
    before = made.lr(85)
    made.end_early(85, 90, "budget")
    assert made.lr(85) == pytest.approx(before) == pytest.approx(0.5)
    assert made.lr(89) == pytest.approx(0.5 * (1 - math.sqrt(4 / 5))) and made.lr(90) == 0.0
    assert made.branch_step == 80


def test_early_end_between_validations() -> None:
    made = wsd(final=0.0, validate_every=3)
    made.end_early(33, 45, "budget")
    assert (made.end_epoch, made.end_step, made.ends_between_validations) == (6, 45, True)
    assert made.ends(Position(3, 3, 33)) == [45] and made.place_in_decay(40) == (7, 12)
    assert made.lr(33) == 1.0 and made.lr(42) == pytest.approx(1 - math.sqrt(9 / 12)) and made.lr(45) == 0.0
    assert made.meta["schedule"] == made.meta["schedule"] | {"end_step": 45, "ends_between_validations": True}
    again = wsd(final=0.0, validate_every=3, step=45, progress=made.progress["schedule"])
    assert again.decay == made.decay
    made.end_early(40, 42, "budget")
    assert (made.end_epoch, made.end_step) == (6, 42) and made.lr(42) == 0.0


@pytest.mark.parametrize(("step", "end"), [(29, (30, 3, False)), (30, (30, 3, False)), (31, (32, 6, True))])
def test_early_end_that_has_passed_is_now(step: int, end: tuple[int, int, bool]) -> None:
    """Steps 30 and 60 are followed by a validation."""
    made = wsd(validate_every=3)
    made.end_early(step, 30, "budget")
    assert (made.end_step, made.end_epoch, made.ends_between_validations) == end


def test_checkpoint_of_an_earlier_version_ends_with_its_epoch() -> None:
    made = wsd()
    made.end_early(42, 50, "budget")
    kept = made.progress["schedule"]
    kept = kept | {"decay": {key: value for key, value in kept["decay"].items() if key != "end_step"}}
    assert wsd(step=45, progress=kept).decay == made.decay


def test_early_end_is_restored_from_a_checkpoint() -> None:
    made = wsd(time_budget_minutes=60)
    made.end_early(42, 50, "budget")
    kept = made.progress["schedule"]
    for step in (42, 45):
        again = wsd(time_budget_minutes=60, step=step, progress=kept)
        assert (again.decay, again.branch_step, again.progress) == (made.decay, 42, made.progress)


@pytest.mark.parametrize(("epochs", "minutes"), [(15, 60), (10, 90), (10, None)])
def test_early_end_that_has_not_begun_is_dropped_with_its_setting(epochs: int, minutes: float | None) -> None:
    made = wsd(time_budget_minutes=60)
    made.end_early(42, 50, "budget")
    kept = made.progress["schedule"]
    assert wsd(epochs, time_budget_minutes=minutes, step=42, progress=kept).end_epoch == epochs
    assert wsd(epochs, time_budget_minutes=minutes, step=43, progress=kept).end_epoch == 5


def test_patience_begins_the_decay_after_validations_without_a_better_one() -> None:
    made = wsd(patience=2)
    outcomes = [made.validated(Position(epoch, 0, 10 * epoch), best) for epoch, best in enumerate([1, 0, 1, 0, 0], 1)]
    assert outcomes == [False, False, False, False, True]
    # 50 stable steps are 80 % of 62.5: the decay takes the rest of seven epochs.
    assert made.decay_facts() | {"share": 0} == {
        "reason": "patience", "end_epoch": 7, "planned_epochs": 10, "num_steps": 20, "share": 0,
    }  # fmt: skip
    assert not made.validated(Position(6, 0, 60), best=False)
    kept = wsd(patience=2)
    kept.validated(Position(1, 0, 10), best=False)
    again = wsd(patience=2, step=10, progress=kept.progress["schedule"])
    assert again.validated(Position(2, 0, 20), best=False)
