"""A local cluster starts only what one node needs; a joined cluster stays as it is."""

from __future__ import annotations

import os
import pickle
import threading
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from pillsnap.ray_compat import capabilities, minimal_cluster, patches


@pytest.fixture(autouse=True)
def no_other_users(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each name holds Ray's original, even while another test's cluster is up."""
    capabilities.capabilities()  # probed before the names are changed
    monkeypatch.setattr(patches, "_patches", {})
    for name, module in ray_parts().items():
        monkeypatch.setattr(module, name, f"Ray's {name}")


def ray_parts() -> dict[str, ModuleType]:
    """The module of Ray in which each name may be replaced."""
    from ray.data._internal import stats
    from ray.data._internal.cluster_autoscaler import rate_based_cluster_autoscaler as autoscaler
    from ray.data._internal.execution.operators import actor_pool_map_operator as pool

    return {
        "get_or_create_stats_actor": stats,
        "get_or_create_actor_location_tracker": pool,
        "get_actor_locations": pool,
        "DefaultAutoscalingCoordinator": autoscaler,
    }


def now() -> dict[str, Any]:
    return {name: getattr(module, name) for name, module in ray_parts().items()}


def test_a_joined_cluster_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PILLSNAP_MINIMAL_RAY", raising=False)
    before = now()
    with minimal_cluster.without_helper_actors():
        assert now() == before


def test_helper_actors_are_replaced_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setenv("PILLSNAP_MINIMAL_RAY", "1")
    before = now()
    with minimal_cluster.without_helper_actors():
        replaced = now()
        with minimal_cluster.without_helper_actors():
            pass
        assert now() == replaced, "still in use"
    assert now() == before
    assert not set(replaced.values()) & set(before.values())
    assert replaced["get_actor_locations"](("a", "b")) == {}  # Ray Data keeps the node that an actor reported itself
    for name in ("get_or_create_stats_actor", "get_or_create_actor_location_tracker"):
        handle = pickle.loads(pickle.dumps(replaced[name]()))  # Ray Data sends it to its actors
        assert handle.update_actor_location.remote("a", "node") is None

    nodes = [{"NodeID": "a", "Alive": True, "Resources": {"CPU": 2.0}}, {"NodeID": "b", "Alive": False}]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    client = replaced["DefaultAutoscalingCoordinator"]("dataset", subcluster_selector=None)
    client.request_resources(resources=[{"CPU": 1.0}], expire_after_s=1.0)
    assert client.get_reserved_resources() == {"a": {"CPU": 2.0}}


def test_a_failed_start_puts_back_what_it_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    from ray._private import utils
    from ray._private.node import Node

    def parts() -> tuple[object, ...]:
        return Node.start_api_server, Node.start_monitor, Node.start_log_monitor, utils.get_dashboard_dependency_error

    def failing_init(**options: Any) -> None:
        assert minimal_cluster.is_minimal() and not set(parts()) & set(before)
        assert options["num_cpus"] == 2
        raise RuntimeError

    before = parts()
    monkeypatch.delenv("PILLSNAP_MINIMAL_RAY", raising=False)
    monkeypatch.setenv("RAY_TRAIN_METRICS_ENABLED", "1")
    monkeypatch.setattr(ray, "init", failing_init)
    monkeypatch.setattr(minimal_cluster.capabilities, "minimal_head", lambda: True)
    with pytest.raises(RuntimeError), minimal_cluster.local_cluster(num_cpus=2):
        pass
    assert parts() == before
    assert os.environ["RAY_TRAIN_METRICS_ENABLED"] == "1", "what the user set stays"
    assert not minimal_cluster.is_minimal()


def test_without_its_private_parts_ray_starts_by_its_public_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    asked: dict[str, Any] = {}

    def init(**options: Any) -> Any:
        asked.update(options)
        return SimpleNamespace(address_info={"session_dir": str(tmp_path)})

    monkeypatch.delenv("PILLSNAP_MINIMAL_RAY", raising=False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(minimal_cluster.capabilities, "minimal_head", lambda: False)
    with minimal_cluster.local_cluster() as folder:
        assert folder == tmp_path and not minimal_cluster.is_minimal()
    assert asked == {"address": "local", "include_dashboard": False, "log_to_driver": False}


def test_the_wait_for_the_gcs_lets_other_threads_run(tmp_path: Path) -> None:
    """They notice that it has ended; Ray's own wait keeps the interpreter's lock for 30 s."""
    from ray._private import node as nodes

    ticks: list[float] = []
    done = threading.Event()

    def tick() -> None:
        while not done.wait(0.01):
            ticks.append(time.monotonic())

    thread = threading.Thread(target=tick)
    with minimal_cluster._minimal_head():
        thread.start()
        with pytest.raises(RuntimeError, match="Timed out"):
            nodes.wait_for_persisted_port(str(tmp_path), "a1", "gcs_server_port", timeout_ms=1000)
        done.set()
        thread.join()
        assert len(ticks) > 5
        file = tmp_path / nodes.get_port_filename("a1", "gcs_server_port")
        threading.Timer(0.2, file.write_text, ["4711"]).start()
        assert nodes.wait_for_persisted_port(str(tmp_path), "a1", "gcs_server_port", timeout_ms=10_000) == 4711
