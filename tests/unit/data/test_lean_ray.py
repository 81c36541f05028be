"""A cluster of one's own starts what it needs, and a joined one is left as it is."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator

import pytest

from pillsnap.data import lean_ray


@pytest.fixture
def ray_parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, object]]:
    """What may be replaced, as it is now; put back after the test."""
    from ray.data._internal import stats
    from ray.data._internal.execution.operators import actor_pool_map_operator as pool
    from ray.train.v2.api import data_parallel_trainer as trainer

    monkeypatch.delenv("PILLSNAP_LEAN_RAY", raising=False)
    names = [
        (stats, "get_or_create_stats_actor"), (pool, "get_or_create_actor_location_tracker"),
        (pool, "get_actor_locations"), (trainer, "PlacementGroupCleanerCallback"),
    ]  # fmt: skip
    for module, name in names:
        monkeypatch.setattr(module, name, f"Ray's {name}")
    yield {name: lambda module=module, name=name: getattr(module, name) for module, name in names}


def test_a_joined_cluster_is_left_as_it_is(ray_parts: dict) -> None:
    lean_ray.leave_out_actors()
    lean_ray.leave_out_cleaner()
    assert all(read() == f"Ray's {name}" for name, read in ray_parts.items())


def test_a_cluster_of_ones_own_starts_no_actor_that_serves_several_nodes(
    ray_parts: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.train.v2.api.callback import RayTrainCallback

    monkeypatch.setenv("PILLSNAP_LEAN_RAY", "1")
    lean_ray.leave_out_actors()
    lean_ray.leave_out_cleaner()
    assert ray_parts["get_actor_locations"]()(("a", "b")) == {}  # Ray Data keeps the node that an actor told it itself
    assert isinstance(ray_parts["PlacementGroupCleanerCallback"]()(), RayTrainCallback)
    for name in ("get_or_create_stats_actor", "get_or_create_actor_location_tracker"):
        nobody = pickle.loads(pickle.dumps(ray_parts[name]()()))  # Ray Data hands it to its actors
        assert nobody.update_actor_location.remote("a", "node") is None


def test_the_head_gets_its_own_ways_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private.node import Node

    before = (Node.start_api_server, Node.start_monitor, Node.start_log_monitor)
    monkeypatch.setenv("PILLSNAP_LEAN_RAY", "")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    monkeypatch.setattr(lean_ray, "leave_out_actors", lambda: None)
    with pytest.raises(RuntimeError), lean_ray.lean_head():
        assert lean_ray.is_lean() and Node.start_monitor is not before[1]
        raise RuntimeError
    assert (Node.start_api_server, Node.start_monitor, Node.start_log_monitor) == before
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "1", "what the user set stays"
