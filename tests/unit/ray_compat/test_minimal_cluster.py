"""A cluster of one's own starts what it needs, and a joined one is left as it is."""

from __future__ import annotations

import asyncio
import os
import pickle
from types import ModuleType

import pytest

from pillsnap.ray_compat import minimal_cluster


@pytest.fixture
def ray_parts(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """The module of Ray's in which each name may be replaced; put back after the test."""
    from ray.data._internal import stats
    from ray.data._internal.cluster_autoscaler import rate_based_cluster_autoscaler as autoscaler
    from ray.data._internal.execution.operators import actor_pool_map_operator as pool
    from ray.train.v2._internal.execution.scaling_policy import factory
    from ray.train.v2.api import data_parallel_trainer as trainer

    monkeypatch.delenv("PILLSNAP_LEAN_RAY", raising=False)
    parts = {
        "get_or_create_stats_actor": stats,
        "get_or_create_actor_location_tracker": pool,
        "get_actor_locations": pool,
        "DefaultAutoscalingCoordinator": autoscaler,
        "PlacementGroupCleanerCallback": trainer,
        "FixedScalingPolicy": factory,
    }
    for name, module in parts.items():
        monkeypatch.setattr(module, name, f"Ray's {name}")
    return parts


def test_a_joined_cluster_is_left_as_it_is(ray_parts: dict[str, ModuleType]) -> None:
    minimal_cluster.leave_out_actors()
    minimal_cluster.leave_out_train_actors()
    assert all(getattr(module, name) == f"Ray's {name}" for name, module in ray_parts.items())


def test_a_cluster_of_ones_own_starts_no_actor_that_serves_several_nodes(
    ray_parts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray
    from ray.train import ScalingConfig
    from ray.train.v2.api.callback import RayTrainCallback

    monkeypatch.setenv("PILLSNAP_LEAN_RAY", "1")
    minimal_cluster.leave_out_actors()
    minimal_cluster.leave_out_train_actors()
    now = {name: getattr(module, name) for name, module in ray_parts.items()}
    assert now["get_actor_locations"](("a", "b")) == {}  # Ray Data keeps the node that an actor told it itself
    assert isinstance(now["PlacementGroupCleanerCallback"](), RayTrainCallback)
    for name in ("get_or_create_stats_actor", "get_or_create_actor_location_tracker"):
        nobody = pickle.loads(pickle.dumps(now[name]()))  # Ray Data hands it to its actors
        assert nobody.update_actor_location.remote("a", "node") is None

    nodes = [{"NodeID": "a", "Alive": True, "Resources": {"CPU": 2.0}}, {"NodeID": "b", "Alive": False}]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    data = now["DefaultAutoscalingCoordinator"]("dataset", subcluster_selector=None)
    data.request_resources(resources=[{"CPU": 1.0}], expire_after_s=1.0)
    assert data.get_reserved_resources() == {"a": {"CPU": 2.0}}
    workers = ray.cloudpickle.loads(ray.cloudpickle.dumps(now["FixedScalingPolicy"](ScalingConfig(num_workers=3))))
    workers.after_controller_start(None)
    assert workers.make_decision_for_non_running_worker_group().num_workers == 3  # Ray is not up: it asked no actor
    asyncio.run(workers.before_controller_shutdown())


def test_the_head_gets_its_own_ways_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private import utils
    from ray._private.node import Node

    def parts() -> tuple[object, ...]:
        return Node.start_api_server, Node.start_monitor, Node.start_log_monitor, utils.get_dashboard_dependency_error

    before = parts()
    monkeypatch.setenv("PILLSNAP_LEAN_RAY", "")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    monkeypatch.setattr(minimal_cluster, "leave_out_actors", lambda: None)
    with pytest.raises(RuntimeError), minimal_cluster.lean_head():
        assert minimal_cluster.is_lean() and not set(parts()) & set(before)
        raise RuntimeError
    assert parts() == before
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "1", "what the user set stays"
