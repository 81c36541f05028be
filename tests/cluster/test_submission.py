"""An invalid submission fails within 30 s, with one line and the exit code; stopped jobs can be resumed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import toy
from tests.cluster.hosts import why_not
from tests.cluster.ray_hosts import Job, RayHosts
from tests.reliability.harness import raw_events, wait_for

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())
LIMIT_S = 30.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHosts]:
    with RayHosts([tmp_path_factory.getbasetemp()], workers=2) as hosts:
        yield hosts


def error_line(job: Job) -> str:
    """The line of pillsnap in the message of a failed job."""
    assert job.status == "FAILED" and job.exit_code == 2, job
    assert job.message.startswith("Job entrypoint command failed with exit code 2")
    assert "Traceback" not in job.message
    (line,) = [line for line in job.message.splitlines() if line.startswith("pillsnap: ")]
    assert job.message.rstrip().endswith(line), "it is the last line"
    return line


def refused(cluster: RayHosts, job_id: str, *arguments: str) -> tuple[str, float]:
    """Submit a training that fails; returns its error line, and the seconds until its status."""
    start_s = time.monotonic()
    cluster.submit("python", "jobs/train_stage3.py", *arguments, job_id=job_id)
    job = cluster.wait_for_job(job_id, 600)
    return error_line(job), time.monotonic() - start_s


def test_invalid_submission_fails_with_one_line_within_30_s(
    cluster: RayHosts, tmp_path: Path, toy_manifest: Path, toy_tree: Path, record_property: pytest.RecordProperty
) -> None:
    sealed = tmp_path / "sealed"
    sealed.mkdir()
    for host in (cluster.head, *cluster.workers):  # root can write everywhere except to read-only mounts
        host.run("mount", "--bind", "-o", "ro", str(sealed), str(sealed))
    run = tmp_path / "run"
    cases = {
        "manifest": (toy.arguments(run, tmp_path / "nothing", toy_tree), f"{tmp_path / 'nothing'}"),
        "rights": (toy.arguments(sealed / "run", toy_manifest, toy_tree), f"{sealed / 'run'}: Read-only file system"),
        "gpu": (toy.arguments(run, toy_manifest, toy_tree, train__device="gpu"), "Ray has no GPU on its 3 nodes"),
        "setting": (toy.arguments(run, toy_manifest, toy_tree, train__devise="gpu"), "There is no setting 'train.dev"),
    }
    for name, (arguments, expected) in cases.items():
        line, seconds = refused(cluster, f"fails-{name}", *arguments)
        record_property(f"{name}_s", round(seconds, 1))
        print(f"{name}: FAILED after {seconds:.1f} s: {line}")
        assert expected in line
        assert seconds < LIMIT_S


def test_node_without_the_photos_is_reported(
    cluster: RayHosts, tmp_path: Path, toy_manifest: Path, toy_tree: Path
) -> None:
    (tmp_path / "empty").mkdir()
    cluster.workers[1].run("mount", "--bind", str(tmp_path / "empty"), str(toy_tree))
    try:
        arguments = toy.arguments(tmp_path / "run", toy_manifest, toy_tree)
        line, seconds = refused(cluster, "fails-photos", *arguments)
        print(f"photos: FAILED after {seconds:.1f} s: {line}")
        assert "photos on every node: on worker2 " in line and "worker1" not in line
        options = ["--preset", "demo", "--run", str(tmp_path / "run"), "--manifest", str(toy_manifest),
                   "--data-root", str(toy_tree)]  # fmt: skip
        cluster.submit("pillsnap", "preflight", *options, job_id="preflight")
        job = cluster.wait_for_job("preflight", 600)
        output = " ".join(cluster.logs("preflight").split())
        assert (job.status, job.exit_code) == ("FAILED", 1)
        assert "no photos on every node" in output and "on worker2 " in output
        assert "ok run directory on every node" in output and "ok packages on every node" in output
        assert "ok nodes" in output and "3 of 3 answer" in output
    finally:
        cluster.workers[1].run("umount", str(toy_tree))


def test_dashboard_needs_the_tunnel_and_the_token(cluster: RayHosts) -> None:
    """The dashboard is not reachable from another host, and rejects requests without the token."""
    request = "import urllib.request; urllib.request.urlopen('http://{}:8265/api/jobs/', timeout=5)"
    with pytest.raises(RuntimeError, match="refused"):
        cluster.workers[0].run("python3", "-c", request.format(cluster.head.ip))
    with pytest.raises(RuntimeError, match=r"401|403"):
        cluster.head.run("python3", "-c", request.format("127.0.0.1"))


@pytest.mark.reliability
def test_ray_job_stop_saves_a_checkpoint_from_which_the_same_submission_resumes(
    cluster: RayHosts, tmp_path: Path, toy_manifest: Path, toy_tree: Path
) -> None:
    run_dir = tmp_path / "run"
    arguments = toy.arguments(
        run_dir, toy_manifest, toy_tree, train__task="classification", classification__epochs=40,
        train__checkpoint_minutes=60,
    )  # fmt: skip
    cluster.submit("python", "jobs/train_stage3.py", *arguments, job_id="stopped")
    wait_for(lambda: raw_events(run_dir, "step")[3:], 1800, "fourth step")
    start_s = time.monotonic()
    assert cluster.cli("job", "stop", "--address", "http://127.0.0.1:8265", "--no-wait", "stopped").returncode == 0
    job = cluster.wait_for_job("stopped", 600)
    seconds = time.monotonic() - start_s
    assert job.status == "STOPPED"
    assert "Give the same command again to continue." in cluster.logs("stopped")
    last = json.loads((run_dir / "checkpoints" / "classification" / "last.json").read_text())
    done = [event["step"] for event in raw_events(run_dir, "step")]
    saved = [event["step"] for event in raw_events(run_dir, "checkpoint")]
    assert saved[-1] == done[-1], "the checkpoint has the last completed step"
    print(f"stopped after {seconds:.1f} s at step {done[-1]} with checkpoint {last}")
    cluster.submit("python", "jobs/train_stage3.py", *arguments, job_id="continued")
    wait_for(lambda: [e for e in raw_events(run_dir, "step") if e["step"] > done[-1]], 1800, "step after the stop")
    assert cluster.cli("job", "stop", "--address", "http://127.0.0.1:8265", "--no-wait", "continued").returncode == 0
    assert cluster.wait_for_job("continued", 600).status == "STOPPED"
    steps = [event["step"] for event in raw_events(run_dir, "step")]
    assert steps == list(range(1, len(steps) + 1)), "no step is missing or repeated"
