"""A cluster of one's own starts what it needs, and a joined one is left as it is."""

from __future__ import annotations

import os
import pickle
from types import ModuleType

import pytest

from pillsnap.data import lean_ray


@pytest.fixture
def ray_parts(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """The module of Ray's in which each name may be replaced; put back after the test."""
    from ray.data._internal import stats
    from ray.data._internal.execution.operators import actor_pool_map_operator as pool
    from ray.train.v2.api import data_parallel_trainer as trainer

    monkeypatch.delenv("PILLSNAP_LEAN_RAY", raising=False)
    parts = {
        "get_or_create_stats_actor": stats,
        "get_or_create_actor_location_tracker": pool,
        "get_actor_locations": pool,
        "PlacementGroupCleanerCallback": trainer,
    }
    for name, module in parts.items():
        monkeypatch.setattr(module, name, f"Ray's {name}")
    return parts


def test_a_joined_cluster_is_left_as_it_is(ray_parts: dict[str, ModuleType]) -> None:
    lean_ray.leave_out_actors()
    lean_ray.leave_out_cleaner()
    assert all(getattr(module, name) == f"Ray's {name}" for name, module in ray_parts.items())


def test_a_cluster_of_ones_own_starts_no_actor_that_serves_several_nodes(
    ray_parts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.train.v2.api.callback import RayTrainCallback

    monkeypatch.setenv("PILLSNAP_LEAN_RAY", "1")
    lean_ray.leave_out_actors()
    lean_ray.leave_out_cleaner()
    now = {name: getattr(module, name) for name, module in ray_parts.items()}
    assert now["get_actor_locations"](("a", "b")) == {}  # Ray Data keeps the node that an actor told it itself
    assert isinstance(now["PlacementGroupCleanerCallback"](), RayTrainCallback)
    for name in ("get_or_create_stats_actor", "get_or_create_actor_location_tracker"):
        nobody = pickle.loads(pickle.dumps(now[name]()))  # Ray Data hands it to its actors
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
