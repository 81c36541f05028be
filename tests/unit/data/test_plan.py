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


@settings(deadline=None)
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


def drawn(plan: StreamPlan) -> list[list[int]]:
    """The training samples of each epoch."""
    epochs: list[list[int]] = [[] for _ in range(plan.epochs)]
    for epoch, training, _, members in steps_of(plan):
        epochs[epoch] += members if training else []
    return epochs


def test_order_of_whole_epochs_is_that_of_the_first_versions() -> None:
    plan = StreamPlan(42, 3, 1000, 10, 64, 1)
    for epoch, members in enumerate(drawn(plan)):
        assert members == np.random.Generator(np.random.Philox(key=[42, epoch])).permutation(1000).tolist()
    assert [plan.slot(number).passes.tolist() for number in (0, 17, 18)] == [[0] * 64, [1] * 64, [1] * 64]
    assert plan.slot(16).passes.tolist() == [0] * 10 and not plan.slot(16).training


@given(
    num_train=st.integers(1, 40), per_epoch=st.integers(1, 90), per_worker=st.integers(1, 5), every=st.integers(1, 5),
    num_val=st.integers(0, 9), epochs=st.integers(1, 7), data=st.data(),
)  # fmt: skip
def test_epochs_of_any_size_take_one_sequence_of_permutations(
    num_train: int, per_epoch: int, per_worker: int, every: int, num_val: int, epochs: int, data: st.DataObject
) -> None:
    plans = [
        StreamPlan(5, epochs, num_train, num_val, 4 * per_worker, workers, per_epoch, every) for workers in (1, 2, 4)
    ]
    plan, first = plans[0], steps_of(plans[0])
    assert steps_of(plans[1]) == steps_of(plans[2]) == first
    assert [len(members) for members in drawn(plan)] == [per_epoch] * epochs
    stream = [i for members in drawn(plan) for i in members]
    for start in range(0, len(stream), num_train):  # every sample comes before any comes again
        assert len(set(stream[start : start + num_train])) == len(stream[start : start + num_train])
    passes = [p for number in range(plan.num_slots) if (s := plan.slot(number)).training for p in s.passes.tolist()]
    assert passes == [place // num_train for place in range(len(stream))]
    validated = sorted({epoch for epoch, training, _, _ in first if not training})
    expected = sorted({*range(every - 1, epochs, every), epochs - 1})
    assert validated == (expected if num_val else [])
    assert [epoch for epoch in range(epochs) if plan.validates(epoch)] == expected
    assert [i for epoch, training, _, members in first if not training for i in members] == [*range(num_val)] * len(
        expected
    )
    epoch, step = data.draw(st.integers(0, epochs - 1)), data.draw(st.integers(0, plan.train_steps - 1))
    rest = steps_of(plan, plan.first_slot(epoch, step))
    assert rest == first[-len(rest) :] and rest[0][:3] == (epoch, True, step)
    assert plan.first_slot(epochs) == plan.num_slots


def test_shuffled_longer_than_the_data_has_new_permutations() -> None:
    (stream,) = drawn(StreamPlan(3, 1, 50, 0, 8, 1, samples_per_epoch=150))
    orders = [stream[start : start + 50] for start in (0, 50, 100)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3


@pytest.mark.parametrize(("share", "per_epoch"), [(0.5, 40), (0.25, 7), (0.9, 30), (1.0, 12), (0.0, 12)])
def test_share_of_combinations_is_exact_in_every_epoch(share: float, per_epoch: int) -> None:
    apart = round(share * per_epoch)
    plans = [StreamPlan(1, 9, 60, 3, 4, workers, per_epoch, 2, 6, apart) for workers in (1, 2, 4)]
    assert steps_of(plans[1]) == steps_of(plans[2]) == steps_of(plans[0])
    epochs = drawn(plans[0])
    assert [sum(i >= 54 for i in members) for members in epochs] == [apart] * 9
    for members in epochs:  # evenly interleaved
        for length in range(1, per_epoch + 1):
            assert sum(i >= 54 for i in members[:length]) == length * apart // per_epoch
    stream = [i for members in epochs for i in members]
    for size, numbers in ((6, [i for i in stream if i >= 54]), (54, [i for i in stream if i < 54])):
        rounds = [numbers[start : start + size] for start in range(0, len(numbers), size)]
        assert all(len(set(members)) == len(members) for members in rounds)
    rest = steps_of(plans[1], plans[1].first_slot(4, 1))
    assert rest == steps_of(plans[1])[-len(rest) :]


def test_both_sequences_have_orders_of_their_own() -> None:
    (stream,) = drawn(StreamPlan(1, 1, 80, 0, 8, 1, 80, 1, 40, 40))
    singles, combinations = [i for i in stream if i < 40], [i - 40 for i in stream if i >= 40]
    assert sorted(singles) == sorted(combinations) and singles != combinations
