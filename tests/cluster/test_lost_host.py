"""A job that loses a worker host within an epoch finishes, with every sample and every epoch once."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from pillsnap.observe.events import read_events
from tests.cluster import toy
from tests.cluster.hosts import Host, why_not
from tests.cluster.ray_hosts import RayHosts, cluster_file_environment
from tests.reliability.harness import raw_events, say, wait_for

pytestmark = [pytest.mark.reliability, pytest.mark.skipif(bool(why_not()), reason=why_not())]
TASK = "classification"
LONG_S = 1800.0  # sized for a busy machine


def submit(cluster: RayHosts, run_dir: Path, manifest: Path, root: Path, workers: str, epochs: int) -> None:
    arguments = toy.arguments(
        run_dir, manifest, root, train__task=TASK, train__num_workers=workers, train__hang_timeout_s=30,
        train__checkpoint_minutes=0.1, train__max_failures=10, classification__epochs=epochs,
    )  # fmt: skip
    toy.submit_counted(cluster, "train", run_dir / "ids", *arguments, step_pause_s=1.0)


def wait_for_steps(run_dir: Path, more: int) -> int:
    """Wait for `more` steps, to be within an epoch; returns the last step."""
    goal = len(raw_events(run_dir, "step")) + more
    wait_for(lambda: len(raw_events(run_dir, "step")) >= goal, LONG_S, f"{more} more steps")
    return raw_events(run_dir, "step")[-1]["step"]


def wait_for_workers(run_dir: Path, earlier: int, size: int, without: str = "") -> tuple[dict[int, str], float]:
    """Wait for a start after the first `earlier`, with `size` workers, none on the host `without`.

    Returns the hosts by rank, and the seconds waited.
    """
    begin_s = time.monotonic()

    def started() -> bool:
        found = toy.starts(run_dir)
        return len(found) > earlier and len(found[-1]) == size and without not in found[-1].values()

    wait_for(started, LONG_S, f"start with {size} workers")
    return toy.starts(run_dir)[-1], time.monotonic() - begin_s


def assert_nothing_lost(run_dir: Path, manifest: Path, epochs: int) -> int:
    events = read_events(run_dir)
    assert toy.epochs(events, TASK) == list(range(1, epochs + 1))
    steps = sorted(toy.losses(events, TASK))
    assert steps == list(range(1, len(steps) + 1))
    assert [event for event in events if event["kind"] == "failure"] == []
    return toy.assert_every_sample_once(events, run_dir / "ids", manifest, TASK, epochs)


def named(cluster: RayHosts, name: str) -> Host:
    return next(worker for worker in cluster.workers if worker.name == name)


def test_killed_raylet_moves_its_worker_to_another_host(tmp_path: Path, toy_manifest: Path, toy_tree: Path) -> None:
    run_dir, epochs = tmp_path / "run", 12
    with RayHosts([tmp_path.parent], workers=3, environment=cluster_file_environment()) as cluster:
        submit(cluster, run_dir, toy_manifest, toy_tree, "2", epochs)
        before, _ = wait_for_workers(run_dir, 0, 2)
        wait_for_steps(run_dir, 6)
        cluster.stop_ray(named(cluster, before[0]))
        after, seconds = wait_for_workers(run_dir, 1, 2, without=before[0])
        assert before[0] not in after.values()
        job = cluster.wait_for_job("train", LONG_S)
        assert (job.status, job.exit_code) == ("SUCCEEDED", 0), cluster.logs("train")[-3000:]
    samples = assert_nothing_lost(run_dir, toy_manifest, epochs)
    say(1, 1, f"raylet of the first worker killed: two workers again after {seconds:.0f} s, finished, each of "
              f"{samples} samples once in each of {epochs} epochs")  # fmt: skip


def test_disconnected_host_reduces_the_workers_until_it_returns(
    tmp_path: Path, toy_manifest: Path, toy_tree: Path
) -> None:
    run_dir, epochs = tmp_path / "run", 60
    with RayHosts([tmp_path.parent], workers=2, environment=cluster_file_environment()) as cluster:
        submit(cluster, run_dir, toy_manifest, toy_tree, "1:2", epochs)
        both, _ = wait_for_workers(run_dir, 0, 2)
        wait_for_steps(run_dir, 6)
        host = named(cluster, both[0])
        host.disconnect()
        lost_s = cluster.wait_for_nodes(2, LONG_S)
        _, alone_s = wait_for_workers(run_dir, 1, 1, without=host.name)
        wait_for_steps(run_dir, 4)
        host.reconnect()
        cluster.leave(host)
        earlier = len(toy.starts(run_dir))
        cluster.join(host, 3)
        _, again_s = wait_for_workers(run_dir, earlier, 2)
        wait_for_steps(run_dir, 4)
        earlier = len(toy.starts(run_dir))
        cluster.stop_ray(named(cluster, both[1]))
        wait_for_workers(run_dir, earlier, 1, without=both[1])
        job = cluster.wait_for_job("train", LONG_S)
        assert (job.status, job.exit_code) == ("SUCCEEDED", 0), cluster.logs("train")[-3000:]
    samples = assert_nothing_lost(run_dir, toy_manifest, epochs)
    say(1, 1, f"first worker disconnected: node lost after {lost_s:.0f} s, one worker after "
              f"{lost_s + alone_s:.0f} s, two again {again_s:.0f} s after it was reconnected; one more raylet killed; "
              f"each of {samples} samples once in each of {epochs} epochs")  # fmt: skip
