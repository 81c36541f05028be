"""Both tasks trained by `ray job submit` on two workers: losses equal those of one host, every sample once."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pillsnap.observe.events import read_events
from tests.cluster import toy
from tests.cluster.hosts import NETWORK, why_not
from tests.cluster.ray_hosts import BIN, ROOT, RayHosts
from tests.reliability.harness import say

pytestmark = [pytest.mark.reliability, pytest.mark.skipif(bool(why_not()), reason=why_not())]
TASKS = ("detection", "classification")
S3_PORT = 5000
S3 = {
    "AWS_ENDPOINT_URL": f"http://{NETWORK}.1:{S3_PORT}",
    "AWS_ACCESS_KEY_ID": "pillsnap",
    "AWS_SECRET_ACCESS_KEY": "pillsnap",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


def train_shared(where: Path, manifest: Path, root: Path, hosts: int) -> toy.Events:
    """Train with photos and run directory on a shared path; returns the events. Samples are recorded in `where`/ids."""
    run_dir = where / "run"
    with RayHosts([where.parent.parent], workers=hosts, cpus=2 / hosts) as cluster:
        toy.submit_counted(cluster, "train", where / "ids", *toy.arguments(run_dir, manifest, root))
        finish(cluster)
    return read_events(run_dir)


def train_s3(where: Path, manifest: Path, root: Path, hosts: int) -> toy.Events:
    """Train with photos, manifest and run in S3 on the head; only sample ids are in the shared folder."""
    with RayHosts([where.parent.parent], workers=hosts, cpus=2 / hosts, environment=S3) as cluster:
        server = (str(BIN / "moto_server"), "-H", cluster.head.ip, "-p", str(S3_PORT))
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        cluster.head.start(*server, env=cluster.environment(), **quiet)
        remote = (sys.executable, "-m", "tests.cluster.remote")
        here = {"env": cluster.environment(), "cwd": ROOT}
        cluster.head.run(*remote, "upload", "pills", str(root), str(manifest), **here)
        options = toy.arguments("toy", "s3://pills/manifest", "s3://pills/photos")
        toy.submit_counted(cluster, "train", where / "ids", "--storage", "s3://pills/runs", *options)
        finish(cluster)
        return json.loads(cluster.head.run(*remote, "events", "s3://pills/runs/toy", **here))


def finish(cluster: RayHosts) -> None:
    job = cluster.wait_for_job("train", 3600)
    assert (job.status, job.exit_code) == ("SUCCEEDED", 0), cluster.logs("train")[-4000:]
    assert "evaluating: both models" in cluster.logs("train")


@pytest.mark.parametrize("train", [train_shared, train_s3])
def test_two_hosts_train_like_one(
    train: Callable[..., toy.Events], tmp_path: Path, toy_manifest: Path, toy_tree: Path
) -> None:
    two = train(tmp_path / "two", toy_manifest, toy_tree, 2)
    one = train_shared(tmp_path / "one", toy_manifest, toy_tree, 1)
    worst, samples = {}, {}
    for task in TASKS:
        mine, control = toy.losses(two, task), toy.losses(one, task)
        assert sorted(mine) == sorted(control) and len(mine) > 4
        worst[task] = max(abs(mine[step] - control[step]) for step in mine)
        samples[task] = toy.assert_every_sample_once(two, tmp_path / "two" / "ids", toy_manifest, task, 2)
        assert toy.epochs(two, task) == [1, 2]
        assert {row["host"] for row in toy.recorded(tmp_path / "two" / "ids", task)} == {"worker1", "worker2"}
    assert [event for event in two if event["kind"] == "failure"] == []
    say(
        sum(difference <= 1e-5 for difference in worst.values()), len(TASKS),
        f"two hosts train like one ({train.__name__}): losses of all steps differ by at most "
        + ", ".join(f"{worst[task]:.1e} ({task}, {samples[task]} samples, each once per epoch)" for task in TASKS),
    )  # fmt: skip
