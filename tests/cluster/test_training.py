"""Both tasks trained by `ray job submit` on a head and two workers: the losses of one host, every sample once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import toy
from tests.cluster.hosts import why_not
from tests.cluster.ray_hosts import RayHosts
from tests.reliability.harness import raw_events, say

pytestmark = [pytest.mark.reliability, pytest.mark.skipif(bool(why_not()), reason=why_not())]
TASKS = ("detection", "classification")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.getbasetemp()


def train(shared: Path, where: Path, manifest: Path, root: Path, *, hosts: int) -> Path:
    run_dir = where / f"{hosts}-hosts"
    with RayHosts([shared], workers=hosts, cpus=2 / hosts) as cluster:
        toy.submit_counted(cluster, f"train-{hosts}", run_dir, *toy.arguments(run_dir, manifest, root))
        job = cluster.wait_for_job(f"train-{hosts}", 3600)
        assert (job.status, job.exit_code) == ("SUCCEEDED", 0), cluster.logs(f"train-{hosts}")[-4000:]
        assert "judging: both models" in cluster.logs(f"train-{hosts}")
    return run_dir


def test_two_hosts_train_what_one_does(shared: Path, tmp_path: Path, toy_manifest: Path, toy_tree: Path) -> None:
    two, one = (train(shared, tmp_path, toy_manifest, toy_tree, hosts=number) for number in (2, 1))
    assert [set(hosts.values()) for hosts in toy.starts(two)] == [{"worker1", "worker2"}] * len(TASKS)
    worst, samples = {}, {}
    for task in TASKS:
        mine, control = toy.losses(two, task), toy.losses(one, task)
        assert sorted(mine) == sorted(control) and len(mine) > 4
        worst[task] = max(abs(mine[step] - control[step]) for step in mine)
        samples[task] = toy.assert_every_sample_once(two, toy_manifest, task, 2)
        assert toy.epochs(two, task) == [1, 2]
    assert len(raw_events(two, "failure")) == 0
    say(
        sum(difference <= 1e-5 for difference in worst.values()), len(TASKS),
        "two hosts train what one does: losses of all steps differ by at most "
        + ", ".join(f"{worst[task]:.1e} ({task}, {samples[task]} samples, each once an epoch)" for task in TASKS),
    )  # fmt: skip
