"""The cluster files against Ray's own schema, KubeRay's fields, and the versions of the lock."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER_FILES = ["cluster.yaml", "deploy/aws.yaml"]
JOBS = sorted(path.name for path in (ROOT / "jobs").glob("*.py"))
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")


def _yaml(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def _rayjob() -> dict[str, Any]:
    documents = yaml.safe_load_all((ROOT / "deploy/rayjob.yaml").read_text(encoding="utf-8"))
    return next(document for document in documents if document["kind"] == "RayJob")


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_ray_accepts_the_cluster_file(name: str) -> None:
    """Ray's launcher fills the defaults and validates the result against ray-schema.json."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(_yaml(name))
    validate_config(config)
    assert config["head_start_ray_commands"] == _yaml(name)["head_start_ray_commands"]


def test_the_schema_check_can_fail() -> None:
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import prepare_config, validate_config

    with pytest.raises(ValidationError):
        validate_config({**prepare_config(_yaml("cluster.yaml")), "worker_nodes_count": 3})


def test_one_machine_is_the_default_and_more_are_more_addresses() -> None:
    from ray.autoscaler._private.util import prepare_config

    config = _yaml("cluster.yaml")
    assert config["provider"]["worker_ips"] == []
    config["provider"]["worker_ips"] = ["192.168.0.11", "192.168.0.12"]
    config["max_workers"] = 2
    (node_type,) = prepare_config(config)["available_node_types"].values()
    assert (node_type["min_workers"], node_type["max_workers"]) == (2, 2)


def test_the_cloud_cluster_scales_gpu_and_cpu_groups_apart() -> None:
    groups = _yaml("deploy/aws.yaml")["available_node_types"]
    assert groups["head"]["resources"]["CPU"] == 0
    assert groups["gpu"]["max_workers"] > groups["gpu"]["min_workers"] >= 1
    assert groups["cpu"]["max_workers"] > groups["cpu"]["min_workers"] == 0


def test_ray_accepts_the_runtime_environment() -> None:
    from ray.runtime_env import RuntimeEnv

    environment = RuntimeEnv(**_yaml("runtime_env.yaml"))
    assert "pip" not in environment, "packages come from the lock on the nodes, not from a job"
    # Ray refuses to merge a variable that both the job and ray.init set, so session.py's must not be here.
    assert set(environment.env_vars()) == {"PYTHONUNBUFFERED", "RAY_JOB_STOP_WAIT_TIME_S"}


def test_a_stopped_job_has_time_for_a_checkpoint() -> None:
    for environment in (_yaml("runtime_env.yaml"), yaml.safe_load(_rayjob()["spec"]["runtimeEnvYAML"])):
        assert int(environment["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) >= 60


# Field names of KubeRay's ray.io/v1 types and of the core/v1 types, as far as the file uses any of them.
RAYJOB_SPEC = {
    "activeDeadlineSeconds", "backoffLimit", "clusterSelector", "deletionStrategy", "entrypoint", "entrypointNumCpus",
    "entrypointNumGpus", "entrypointResources", "jobId", "managedBy", "metadata", "rayClusterSpec", "runtimeEnvYAML",
    "shutdownAfterJobFinishes", "submissionMode", "submitterConfig", "submitterPodTemplate", "suspend",
    "ttlSecondsAfterFinished",
}  # fmt: skip
RAYCLUSTER_SPEC = {
    "authOptions", "autoscalerOptions", "enableInTreeAutoscaling", "gcsFaultToleranceOptions", "headGroupSpec",
    "headServiceAnnotations", "managedBy", "rayVersion", "suspend", "upgradeStrategy", "workerGroupSpecs",
}  # fmt: skip
HEAD_GROUP = {"enableIngress", "headService", "labels", "rayStartParams", "resources", "serviceType", "template"}
WORKER_GROUP = {
    "groupName", "idleTimeoutSeconds", "labels", "maxReplicas", "minReplicas", "numOfHosts", "rayStartParams",
    "replicas", "resources", "scaleStrategy", "suspend", "template",
}  # fmt: skip
POD_SPEC = {"automountServiceAccountToken", "containers", "nodeSelector", "securityContext", "tolerations", "volumes"}
CONTAINER = {"env", "image", "imagePullPolicy", "name", "ports", "resources", "securityContext", "volumeMounts"}


def test_the_rayjob_uses_fields_that_kuberay_knows() -> None:
    job = _rayjob()
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    assert job["apiVersion"] == "ray.io/v1"
    assert set(spec) <= RAYJOB_SPEC and set(cluster) <= RAYCLUSTER_SPEC
    assert set(cluster["headGroupSpec"]) <= HEAD_GROUP
    for group in cluster["workerGroupSpecs"]:
        assert set(group) <= WORKER_GROUP
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        assert set(pod) <= POD_SPEC
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert set(container) <= CONTAINER
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        for value in group["rayStartParams"].values():
            assert isinstance(value, str), "KubeRay's rayStartParams are strings"
    yaml.safe_load(spec["runtimeEnvYAML"])


def test_ray_has_one_version_everywhere() -> None:
    locked = re.search(r"^ray==(\S+)", LOCK, re.M)
    assert locked and _rayjob()["spec"]["rayClusterSpec"]["rayVersion"] == locked[1]


def test_the_dockerfile_is_pinned_and_runs_as_a_user() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    lines = re.sub(r"\\\n", " ", text).splitlines()
    instructions = [line.split(maxsplit=1) for line in lines if line.strip() and not line.startswith("#")]
    kinds = [kind for kind, _ in instructions]
    base = next(rest for kind, rest in instructions if kind == "FROM")
    assert re.fullmatch(r"nvidia/cuda:13\.\d+\.\d+-base-ubuntu24\.04", base), "an exact CUDA tag, never latest"
    assert "ADD" not in kinds
    assert next(rest for kind, rest in reversed(instructions) if kind == "USER") not in ("root", "0")
    runs = [rest for kind, rest in instructions if kind == "RUN"]
    assert all(
        "--no-install-recommends" in run and "rm -rf /var/lib/apt/lists" in run for run in runs if "apt-get" in run
    )
    assert all("--require-hashes" in run or run.endswith(" .") for run in runs if "pip install" in run)
    command = next(rest for kind, rest in instructions if kind == "CMD")
    assert command.startswith("["), "the exec form, so that signals reach the process"


def test_a_dockerfile_linter_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if hadolint is None:
        pytest.skip("hadolint is not in this environment; requirements.lock installs it")
    result = subprocess.run([hadolint, "Dockerfile"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout


def test_the_image_contains_what_the_dockerfile_copies() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for sources in re.findall(r"^COPY (.+) \S+$", text, re.M):
        for source in sources.split():
            assert source in kept and (ROOT / source).exists()


@pytest.mark.parametrize("name", JOBS)
def test_a_job_is_a_few_lines_over_a_command_that_exists(name: str) -> None:
    path = ROOT / "jobs" / name
    assert len(path.read_text().splitlines()) <= 15
    result = subprocess.run([sys.executable, str(path), "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "Usage" in result.stdout
