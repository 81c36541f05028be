"""The node of each read, and its number of slots where workers share nodes."""

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
def test_tasks_of_the_operator_get_a_node(monkeypatch: pytest.MonkeyPatch, others: bool) -> None:
    operator = SimpleNamespace(
        _next_data_task_idx=3, _data_tasks={}, _get_dynamic_ray_remote_args=lambda bundle=None: {"num_cpus": 1}
    )
    nodes = ["a" * 56, "b" * 56]
    alive = [*nodes, *(["c" * 56] if others else [])]
    facts = [{"NodeID": node, "Alive": True, "Resources": {"CPU": 4.0}} for node in alive]
    head = {"NodeID": "d" * 56, "Alive": True, "Resources": {}}
    monkeypatch.setattr("ray.nodes", lambda: [*facts, head])
    NearWorkers(nodes, 0, 1).place_tasks_of(operator)
    options: dict[str, Any] = operator._get_dynamic_ray_remote_args("bundle")
    strategy = options.pop("scheduling_strategy")
    assert options == {"num_cpus": 1}
    assert (strategy.node_id, strategy.soft, strategy._spill_on_unavailable) == ("b" * 56, True, others)


def test_an_operator_without_tasks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.nodes", lambda: [])
    with pytest.raises(AttributeError, match="_get_dynamic_ray_remote_args"):
        NearWorkers(["a", "b"], 0, 1).place_tasks_of(SimpleNamespace(name="MapBatches"))
