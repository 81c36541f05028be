"""Order is a function: every sample once per epoch, the same steps for any number of workers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pillsnap.data.plan import StreamPlan


def steps_of(plan: StreamPlan, first_slot: int = 0) -> list[tuple[int, bool, int, list[int]]]:
    steps = []
    for start in range(first_slot, plan.num_slots, plan.num_workers):
        slots = [plan.slot(start + worker) for worker in range(plan.num_workers)]
        assert len({(slot.epoch, slot.training, slot.step) for slot in slots}) == 1
        steps.append((*slots[0][:3], [int(i) for slot in slots for i in slot.members]))
    return steps


@given(
    num_train=st.integers(1, 90), num_val=st.integers(0, 40), per_worker=st.integers(1, 5), seed=st.integers(0, 2**31)
)
def test_same_steps_for_one_two_and_four_workers(num_train: int, num_val: int, per_worker: int, seed: int) -> None:
    plans = [StreamPlan(seed, 3, num_train, num_val, 4 * per_worker, workers) for workers in (1, 2, 4)]
    first = steps_of(plans[0])
    assert steps_of(plans[1]) == first
    assert steps_of(plans[2]) == first
    for epoch in range(3):
        trained = [i for e, training, _, members in first if e == epoch and training for i in members]
        validated = [i for e, training, _, members in first if e == epoch and not training for i in members]
        assert sorted(trained) == list(range(num_train))
        assert validated == list(range(num_val))


@settings(deadline=None)
@given(epoch=st.integers(0, 2), train_step=st.integers(0, 5), workers=st.sampled_from([1, 2]))
def test_resumed_stream_equals_the_rest_of_the_whole_one(epoch: int, train_step: int, workers: int) -> None:
    plan = StreamPlan(7, 3, 23, 9, 4, workers)
    rest = steps_of(plan, plan.first_slot(epoch, train_step))
    whole = steps_of(plan)
    assert rest == whole[-len(rest) :]
    assert rest[0][:3] == (epoch, True, train_step)


def test_epochs_and_seeds_differ() -> None:
    orders = [
        tuple(np.concatenate([StreamPlan(seed, 2, 50, 0, 10, 1).slot(epoch * 5 + i).members for i in range(5)]))
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    assert len(set(orders)) == 4


def test_samples_in_step_counts_the_short_last_step() -> None:
    plan = StreamPlan(0, 1, 10, 5, 4, 2)
    assert [plan.samples_in_step(True, step) for step in range(plan.train_steps)] == [4, 4, 2]
    assert [plan.samples_in_step(False, step) for step in range(plan.val_steps)] == [4, 1]


@pytest.mark.parametrize("workers", [2, 3, 5, 7])
def test_step_is_shared_by_any_number_of_workers(workers: int) -> None:
    """Elastic workers: when the batch does not divide evenly, the last workers get fewer samples, or none."""
    alone, shared = StreamPlan(3, 2, 23, 7, 4, 1), StreamPlan(3, 2, 23, 7, 4, workers)
    assert steps_of(shared) == steps_of(alone)
    most = shared.worker_batch_size
    assert most == -(-4 // workers)
    assert max(len(shared.slot(number).members) for number in range(shared.num_slots)) == most
