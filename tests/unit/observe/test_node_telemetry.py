"""Every node of a run is sampled into the event log; a failed node only loses samples."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from pillsnap.observe import node_telemetry
from pillsnap.observe.events import EventLog, read_events
from pillsnap.observe.node_telemetry import NodeTelemetry
from pillsnap.observe.run_state import RunState

TWO_NODES = """
import os, sys, time
from pathlib import Path
from ray.cluster_utils import Cluster
from pillsnap.observe.events import EventLog, read_events
from pillsnap.observe.node_telemetry import NodeTelemetry
import ray

run_dir = Path(sys.argv[1])
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 80_000_000})
other = cluster.add_node(num_cpus=1, object_store_memory=80_000_000)
ray.init(address=cluster.address, log_to_driver=False, logging_level=40)


def readings():
    return [event["node"] for event in read_events(run_dir) if event["kind"] == "system"]


def wait_for(condition):
    end_s = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < end_s, readings()
        time.sleep(0.1)


with EventLog(run_dir) as log, NodeTelemetry(log, run_dir, interval_s=0.3) as watch:
    wait_for(lambda: len(watch._samplers) == 1 and len(readings()) >= 6)
    (reading,) = watch._others()
    assert reading["host_memory_total_bytes"] > 0 and reading["node"]
    resources = ray.available_resources()
    assert resources["CPU"] == 2.0, resources
    cluster.remove_node(other, allow_graceful=False)
    wait_for(lambda: not watch._samplers)
    before = len(readings())
    wait_for(lambda: len(readings()) > before + 2)
ray.shutdown()
cluster.shutdown()
print("seen", len(readings()))
"""


@pytest.mark.slow
def test_two_nodes_until_one_is_removed(tmp_path: Path) -> None:
    """In a separate process, because the session fixture already runs a cluster in this one."""
    done = subprocess.run([sys.executable, "-c", TWO_NODES, str(tmp_path)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1].startswith("seen ")


def test_sampling_continues_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NodeTelemetry, "_others", lambda self: [])
    sample, calls = node_telemetry.telemetry.sample, []

    def failing_at_times(path: Path) -> dict[str, object]:
        calls.append(path)
        if len(calls) == 2:
            raise OSError("no such disk")
        return sample(path)

    monkeypatch.setattr(node_telemetry.telemetry, "sample", failing_at_times)
    with EventLog(tmp_path) as log, NodeTelemetry(log, tmp_path, interval_s=0.02):
        end_s = time.monotonic() + 20
        while not read_events(tmp_path):
            assert time.monotonic() < end_s
            time.sleep(0.01)
    event = read_events(tmp_path)[0]
    assert event["host_memory_total_bytes"] > event["host_memory_used_bytes"] > 0
    state = RunState()
    state.apply(event)
    assert state.view()["machines"] == [event]
