"""The adapters for Ray's private parts: probes, effects on the locked Ray, fallbacks, and no private name elsewhere."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import ray

from pillsnap.errors import UserError
from pillsnap.ray_compat import capabilities, minimal_cluster, patches
from pillsnap.ray_compat.reads import Reads
from pillsnap.ray_compat.row_blocks import row_blocks
from pillsnap.ray_compat.source import reads_dataset
from tests.contract.ray_names import OWN, ROOT, count, own_names, private_names

LOCKED = "2.60.0"
"""The Ray of requirements.lock, on which every probe must be true."""
NAMES = [field.name for field in fields(capabilities.Capabilities)]


@pytest.fixture(autouse=True)
def probes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Probes Ray anew for the test, and again for the next."""
    monkeypatch.delenv(capabilities.VARIABLE, raising=False)
    capabilities.forget()
    yield
    monkeypatch.undo()
    capabilities.forget()


@pytest.mark.skipif(ray.__version__ != LOCKED, reason=f"only Ray {LOCKED} has every name")
def test_every_probe_is_true_on_the_locked_ray() -> None:
    assert asdict(capabilities.capabilities()) == dict.fromkeys(NAMES, True)
    assert str(capabilities.capabilities()) == f"all {len(NAMES)} adapters for Ray work"
    assert f"ray=={LOCKED} " in (ROOT / "requirements.lock").read_text()


def test_probes_without_which_training_is_slow_are_true_on_every_ray_of_the_pin() -> None:
    found = asdict(capabilities.capabilities())
    assert {name for name, works in found.items() if not works} <= {
        "no_location_actor", "no_autoscaling_actor", "no_cleaner_actor",
    }  # fmt: skip


TAKEN_AWAY = [
    ("loopback", "ray._private.ray_constants", "ENABLE_RAY_CLUSTER"),
    ("import_path", "ray.job_config", "JobConfig"),
    ("minimal_head", "ray._private.node.Node", "start_monitor"),
    ("worker_command", "ray._private.node.Node", "start_raylet"),
    ("no_stats_actor", "ray.data._internal.stats", "get_or_create_stats_actor"),
    ("no_location_actor", "ray.data._internal.execution.operators.actor_pool_map_operator", "get_actor_locations"),
    (
        "no_autoscaling_actor",
        "ray.data._internal.cluster_autoscaler.rate_based_cluster_autoscaler",
        "DefaultAutoscalingCoordinator",
    ),
    ("no_cleaner_actor", "ray.train.v2.api.data_parallel_trainer", "PlacementGroupCleanerCallback"),
    ("executor_callbacks", "ray.data._internal.execution.execution_callback.ExecutionCallback", "on_execution_step"),
    ("lazy_source", "ray.data._internal.planner.planner.Planner", "_DEFAULT_PLAN_FNS"),
    (
        "executor_pacing",
        "ray.data._internal.execution.streaming_executor_state",
        "WAIT_FOR_TASK_COMPLETION_TIMEOUT_S",
    ),
    ("rows_ahead", "ray.data._internal.execution.backpressure_policy", "ENABLED_BACKPRESSURE_POLICIES"),
    (
        "locality",
        "ray.data._internal.execution.operators.task_pool_map_operator.TaskPoolMapOperator",
        "_get_dynamic_ray_remote_args",
    ),
    ("ordered_actors", "ray._common.ray_option_utils", "actor_options"),
]


def owner(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name) if name[0].isupper() else importlib.import_module(path)


@pytest.mark.parametrize(("name", "where", "attribute"), TAKEN_AWAY)
def test_a_probe_is_false_without_its_name_or_with_another_signature(
    monkeypatch: pytest.MonkeyPatch, name: str, where: str, attribute: str
) -> None:
    for (module, replaced), patch in patches._patches.items():  # while another test's cluster is up
        monkeypatch.setattr(module, replaced, patch.original)
    monkeypatch.setattr(patches, "_patches", {})
    if not getattr(capabilities, name)():
        pytest.skip(f"Ray {ray.__version__} lacks {attribute}")
    original = getattr(owner(where), attribute)
    if callable(original) and not isinstance(original, type):
        monkeypatch.setattr(owner(where), attribute, lambda unexpected, *, other: None)
        capabilities.forget()
        assert getattr(capabilities, name)() is False
    for base in owner(where).__mro__ if isinstance(owner(where), type) else [owner(where)]:
        if attribute in vars(base):
            monkeypatch.delattr(base, attribute)
    capabilities.forget()
    assert getattr(capabilities, name)() is False
    assert name in str(capabilities.capabilities())


def test_rows_per_task_is_false_without_its_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.data import DataContext

    context = DataContext.get_current().copy()
    del context._max_num_blocks_in_streaming_gen_buffer
    with DataContext.current(context):
        assert capabilities.rows_per_task() is False


def test_public_turns_every_adapter_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(capabilities.VARIABLE, "public")
    assert asdict(capabilities.capabilities()) == dict.fromkeys(NAMES, False)
    assert str(capabilities.capabilities()) == "Ray's public API only (PILLSNAP_RAY=public)"
    monkeypatch.setenv(capabilities.VARIABLE, "off")
    capabilities.forget()
    with pytest.raises(UserError, match=r"^PILLSNAP_RAY=off is not known: the only value is 'public'\.$"):
        capabilities.capabilities()


def test_the_contexts_of_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.data import DataContext
    from ray.data._internal.execution import backpressure_policy as policies

    def built(**options: Any) -> tuple[int, int, int]:
        with row_blocks(**options):
            context = DataContext.get_current()
            assert context.execution_options.preserve_order and context.target_max_block_size == 1
            limits = context.get_config(policies.ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [])
            kept = context._max_num_blocks_in_streaming_gen_buffer or 0
            return len(context.custom_execution_callback_classes), len(limits), kept

    before = DataContext.get_current()
    all_limits = len(policies.ENABLED_BACKPRESSURE_POLICIES) + 1
    assert built(rows_ahead=4)[:2] == (2, all_limits)
    assert built(rows_per_task=7) == (2, 0, 7)
    assert DataContext.get_current() is before
    monkeypatch.setenv(capabilities.VARIABLE, "public")
    capabilities.forget()
    assert built(rows_ahead=4)[:2] == (0, 0) and built(rows_per_task=7)[::2] != (0, 7)
    assert DataContext.get_current() is before


@pytest.mark.usefixtures("ray_local")
def test_reads_are_the_same_from_either_source(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.data._internal.execution import streaming_executor_state
    from ray.data._internal.planner.planner import Planner

    def rows() -> list[tuple[int, int]]:
        with row_blocks():
            listed = reads_dataset(Reads(5, 100, 3, num_short=4, slots_per_short_read=2))
            made = listed.map_batches(lambda read: read, batch_size=None)
        assert ("_ReadsSource" in str(type(listed._logical_plan.dag))) is capabilities.lazy_source()
        return [(row["first"], row["end"]) for row in made.iter_rows()]

    plans = dict(Planner._DEFAULT_PLAN_FNS)
    lazy = rows()
    assert lazy[:5] == [(5, 7), (7, 9), (9, 11), (11, 13), (13, 16)] and lazy[-1] == (100 - 3, 100)
    assert plans == Planner._DEFAULT_PLAN_FNS, "put back"
    assert streaming_executor_state.WAIT_FOR_TASK_COMPLETION_TIMEOUT_S == 0.1, "put back"
    monkeypatch.setattr(capabilities, "lazy_source", lambda: False)
    assert rows() == lazy


@pytest.mark.usefixtures("ray_local")
def test_the_head_is_minimal() -> None:
    from tests.processes import command_line, descendants

    assert minimal_cluster.is_minimal()
    lines = [" ".join(command_line(process)) for process in descendants()]
    assert any("raylet" in line for line in lines)
    assert not [line for line in lines if any(name in line for name in ("dashboard.py", "monitor.py", "log_monitor"))]


@pytest.mark.slow
def test_weights_are_bit_for_bit_the_same_by_the_public_api_alone(
    toy_manifest: Path, toy_tree: Path, tmp_path: Path
) -> None:
    from pillsnap.runs.checkpoint import find_checkpoint
    from tests.reliability.harness import same_state

    for mode in ("", "public"):
        command = [sys.executable, "-m", "tests.reliability.driver", tmp_path / (mode or "adapters")]
        overrides = json.dumps({"train__task": "classification", "classification__epochs": 1})
        done = subprocess.run(
            [*map(str, [*command, toy_manifest, toy_tree]), overrides],
            env={**os.environ, capabilities.VARIABLE: mode},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-2000:]
    folders = [tmp_path / mode / "checkpoints" / "classification" for mode in ("adapters", "public")]
    ours, public = (find_checkpoint(folder)[0] for folder in folders)
    assert ours and public and ours.position.global_step > 0
    assert same_state(ours, public) == []
    log = (tmp_path / "public" / "train.log").read_text()
    assert log.count("Ray's public API only (PILLSNAP_RAY=public)") == 1


def test_private_names_of_ray_are_named_in_one_package_only() -> None:
    outside = {file: names for file, names in count(ROOT).items() if names and OWN not in Path(file).parents}
    assert outside == {}


def test_each_kind_of_private_name_is_found() -> None:
    source = """
import ray
import ray.data
from ray._private import node
from ray.data import DataContext as Context
from ray.data._internal.stats import DatasetStats
from ray.data.block import _Hidden
ray._private.worker.global_worker
Context._set_current(None)
ray.init(_node_ip_address="127.0.0.1")
setattr(node, "x", 1)
node.start = None
ray.data.read = None
executor._topology
self._own, executor._own, executor.public, context.enable = 1, 2, 3, 4
"""
    assert sorted(private_names(source, known=frozenset({"_own"}))) == [
        "Context._set_current",
        "executor._topology",
        "node.start is set",
        "ray._private",
        "ray._private.node",
        "ray.data._internal.stats.DatasetStats",
        "ray.data.block._Hidden",
        "ray.data.read is set",
        "ray.init(_node_ip_address=)",
        "setattr on node",
    ]
    assert private_names("self._x = other._y") == [], "a file without Ray"
    source = "class _A:\n    _b: int = 1\n    def _c(self):\n        self._d = x._e"
    assert own_names([source]) == {"_A", "_b", "_c", "_d"}
