"""Which node a read is made on, and how many slots it may have to be wholly near."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pillsnap.ray_compat.locality import NearWorkers, slots_near


@pytest.mark.parametrize(
    ("nodes", "slots"),
    [
        ("a", 2),
        ("aa", 2),
        ("ab", 1),
        ("aabb", 2),
        ("aaaabbbb", 2),
        ("aab", 1),
        ("abab", 1),
    ],
)
def test_slots_of_a_read_are_of_one_node(nodes: str, slots: int) -> None:
    assert slots_near(list(nodes), 2) == slots


def test_more_slots_where_a_node_has_more_workers() -> None:
    assert slots_near(list("aaaabbbb"), 8) == 4
    assert slots_near(["a"] * 8, 5) == 5


def test_a_read_is_near_the_worker_whose_slot_is_its_first() -> None:
    near = NearWorkers(["a", "a", "b", "b"], first_slot=4 * 7 + 2, slots_per_read=2)
    assert [near.node(read) for read in range(4)] == ["b", "a", "b", "a"]
    assert [NearWorkers(["a", "b"], 0, 1).node(read) for read in range(3)] == ["a", "b", "a"]


def test_a_read_waits_for_its_own_node_unless_that_is_far_behind() -> None:
    near = NearWorkers(["a", "b"], 0, 1)
    assert [near.place(read, range(read)) for read in range(2)] == ["a", "b"]
    assert near.place(2, {0}) == "a"  # b is free, and a's task ends soon
    assert near.place(3, {0, 2}) == "b"
    assert near.place(4, {0, 2}) == "b"  # a has two tasks to do, b none
    assert near.place(6, {4}) == "a"
    many = NearWorkers(["a", "b"], 0, 1)
    assert [many.place(read, range(read)) for read in range(0, 16, 2)] == [*"aab", *"aba", "b", "a"]


@pytest.mark.parametrize("others", [False, True])
def test_only_tasks_that_make_batches_get_a_node(monkeypatch: pytest.MonkeyPatch, others: bool) -> None:
    def operator(name: str, task: int) -> Any:
        return SimpleNamespace(
            name=name,
            _next_data_task_idx=task,
            _data_tasks={},
            _get_dynamic_ray_remote_args=lambda bundle=None: {"num_cpus": 1},
        )

    nodes = ["a" * 56, "b" * 56]
    there = [*nodes, *(["c" * 56] if others else [])]
    facts = [{"NodeID": node, "Alive": True, "Resources": {"CPU": 4.0}} for node in there]
    head = {"NodeID": "d" * 56, "Alive": True, "Resources": {}}
    monkeypatch.setattr("ray.nodes", lambda: [*facts, head])
    reading, making = operator("Reads", 3), operator("MapBatches(_make_batches)", 3)
    NearWorkers(nodes, 0, 1).attach([reading, making])
    assert reading._get_dynamic_ray_remote_args("bundle") == {"num_cpus": 1}
    options = making._get_dynamic_ray_remote_args("bundle")
    strategy = options.pop("scheduling_strategy")
    assert options == {"num_cpus": 1}
    assert (strategy.node_id, strategy.soft, strategy._spill_on_unavailable) == ("b" * 56, True, others)
