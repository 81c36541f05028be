"""Cluster files are valid for Ray, KubeRay and Kubernetes, and match the locked versions."""

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
KUBERNETES_VERSIONS = ("1.34", "1.37")
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")


def _yaml(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def _rayjob() -> dict[str, Any]:
    documents = yaml.safe_load_all((ROOT / "deploy/rayjob.yaml").read_text(encoding="utf-8"))
    return next(document for document in documents if document["kind"] == "RayJob")


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_cluster_file_is_valid_for_ray(name: str) -> None:
    """The launcher adds defaults and validates the result against ray-schema.json."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(_yaml(name))
    validate_config(config)
    assert config["head_start_ray_commands"] == _yaml(name)["head_start_ray_commands"]


def test_schema_check_rejects_an_unknown_key() -> None:
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import prepare_config, validate_config

    with pytest.raises(ValidationError):
        validate_config({**prepare_config(_yaml("cluster.yaml")), "worker_nodes_count": 3})


def test_further_machines_need_only_their_addresses() -> None:
    from ray.autoscaler._private.util import prepare_config

    config = _yaml("cluster.yaml")
    assert config["provider"]["worker_ips"] == []
    config["provider"]["worker_ips"] = ["192.168.0.11", "192.168.0.12"]
    config["max_workers"] = 2
    (node_type,) = prepare_config(config)["available_node_types"].values()
    assert (node_type["min_workers"], node_type["max_workers"]) == (2, 2)


def test_aws_cluster_scales_gpu_and_cpu_groups_separately() -> None:
    groups = _yaml("deploy/aws.yaml")["available_node_types"]
    assert groups["head"]["resources"]["CPU"] == 0
    assert groups["gpu"]["max_workers"] > groups["gpu"]["min_workers"] >= 1
    assert groups["cpu"]["max_workers"] > groups["cpu"]["min_workers"] == 0


def test_runtime_environment_is_valid_for_ray() -> None:
    from ray.runtime_env import RuntimeEnv

    environment = RuntimeEnv(**_yaml("runtime_env.yaml"))
    assert "pip" not in environment, "packages are installed on the nodes, from the lock"
    # Ray rejects variables set by both the job and ray.init (session.py).
    assert set(environment.env_vars()) == {"PYTHONUNBUFFERED", "RAY_JOB_STOP_WAIT_TIME_S"}


def test_stopped_job_has_time_for_a_checkpoint() -> None:
    for environment in (_yaml("runtime_env.yaml"), yaml.safe_load(_rayjob()["spec"]["runtimeEnvYAML"])):
        assert int(environment["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) >= 60


def _obj(**fields: Any) -> dict[str, Any]:
    """JSON schema of an object with only these fields."""
    return {"type": "object", "properties": fields, "additionalProperties": False}


TEXT, FLAG, COUNT = {"type": "string"}, {"type": "boolean"}, {"type": "integer", "minimum": 0}
NUMBER, ANY_OBJECT, TEXTS = {"type": "number"}, {"type": "object"}, {"type": "array", "items": {"type": "string"}}
LABELS = {"type": "object", "additionalProperties": TEXT}
START_PARAMS = {"rayStartParams": LABELS, "template": _obj(metadata=ANY_OBJECT, spec=ANY_OBJECT)}
# Fields and types of KubeRay's ray.io/v1 custom resource definitions. Pod templates are core/v1, validated against the
# schema of Kubernetes.
HEAD_GROUP = _obj(
    enableIngress=FLAG, headService=ANY_OBJECT, labels=LABELS, resources=LABELS,
    serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"]}, **START_PARAMS,
) | {"required": ["template"]}  # fmt: skip
WORKER_GROUP = _obj(
    groupName=TEXT, idleTimeoutSeconds=COUNT, labels=LABELS, maxReplicas=COUNT, minReplicas=COUNT, numOfHosts=COUNT,
    replicas=COUNT, resources=LABELS, suspend=FLAG,
    scaleStrategy=_obj(workersToDelete=TEXTS, multihostReplicasToDelete=TEXTS), **START_PARAMS,
) | {"required": ["groupName", "maxReplicas", "minReplicas", "template"]}  # fmt: skip
AUTOSCALER = _obj(
    env={"type": "array"}, envFrom={"type": "array"}, idleTimeoutSeconds=COUNT, image=TEXT, imagePullPolicy=TEXT,
    resources=ANY_OBJECT, securityContext=ANY_OBJECT, upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
    version={"enum": ["v1", "v2"]}, volumeMounts={"type": "array"},
)  # fmt: skip
RAYCLUSTER_SPEC = _obj(
    authOptions=_obj(mode={"enum": ["disabled", "token"]}), autoscalerOptions=AUTOSCALER, enableInTreeAutoscaling=FLAG,
    gcsFaultToleranceOptions=ANY_OBJECT, headGroupSpec=HEAD_GROUP, headServiceAnnotations=LABELS, managedBy=TEXT,
    rayVersion=TEXT, suspend=FLAG, upgradeStrategy=ANY_OBJECT,
    workerGroupSpecs={"type": "array", "items": WORKER_GROUP},
) | {"required": ["headGroupSpec"]}  # fmt: skip
RAYJOB = _obj(
    apiVersion={"const": "ray.io/v1"}, kind={"const": "RayJob"}, metadata=ANY_OBJECT,
    spec=_obj(
        activeDeadlineSeconds=COUNT, backoffLimit=COUNT, clusterSelector=LABELS, deletionStrategy=ANY_OBJECT,
        entrypoint=TEXT, entrypointNumCpus=NUMBER, entrypointNumGpus=NUMBER, entrypointResources=TEXT, jobId=TEXT,
        managedBy={"enum": ["ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"]}, metadata=LABELS,
        rayClusterSpec=RAYCLUSTER_SPEC, runtimeEnvYAML=TEXT, shutdownAfterJobFinishes=FLAG,
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        submitterConfig=_obj(backoffLimit=COUNT), submitterPodTemplate=ANY_OBJECT, suspend=FLAG,
        ttlSecondsAfterFinished=COUNT,
    ),
) | {"required": ["apiVersion", "kind", "metadata", "spec"]}  # fmt: skip


def _groups() -> list[dict[str, Any]]:
    cluster = _rayjob()["spec"]["rayClusterSpec"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def test_rayjob_is_valid_for_kuberay() -> None:
    import jsonschema

    job = _rayjob()
    jsonschema.validate(job, RAYJOB)
    for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    yaml.safe_load(job["spec"]["runtimeEnvYAML"])
    misspelt = {**job, "spec": {**job["spec"], "backofLimit": 1}}
    with pytest.raises(jsonschema.ValidationError, match="backofLimit"):
        jsonschema.validate(misspelt, RAYJOB)
    text = {**job, "spec": {**job["spec"], "ttlSecondsAfterFinished": "600"}}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(text, RAYJOB)


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_pods_and_network_policy_are_valid_for_kubernetes(version: str) -> None:
    """Schema of the oldest and the newest maintained Kubernetes, unknown fields rejected."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="requirements.lock installs it")

    for number, group in enumerate(_groups()):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"pod-{number}"}, **group["template"]}
        kubernetes_validate.validate(pod, version, strict=True)
        volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
        for container in pod["spec"]["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        pod["spec"] = {**pod["spec"], "nodeSelektor": {}}
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(pod, version, strict=True)
    documents = yaml.safe_load_all((ROOT / "deploy/rayjob.yaml").read_text(encoding="utf-8"))
    for document in documents:
        if document["kind"] != "RayJob":
            kubernetes_validate.validate(document, version, strict=True)


def test_autoscaler_reads_the_groups_of_the_rayjob() -> None:
    """The autoscaler configuration has a head without CPUs and separate GPU and CPU groups."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
    from ray.autoscaler._private.util import validate_config

    cluster = {"metadata": {"name": "pillsnap", "namespace": "default"}, "spec": _rayjob()["spec"]["rayClusterSpec"]}
    config = _derive_autoscaling_config_from_ray_cr(cluster)
    validate_config(config)
    types = config["available_node_types"]
    assert types[config["head_node_type"]]["resources"]["CPU"] == 0
    assert types["gpu"]["resources"] | {"memory": 0} == {"CPU": 16, "GPU": 1, "memory": 0}
    assert types["cpu"]["resources"].get("GPU", 0) == 0 and types["cpu"]["resources"]["CPU"] >= 16
    assert types["cpu"]["min_workers"] == 0 and types["cpu"]["max_workers"] >= 4
    assert _rayjob()["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"] is True


def test_ray_version_equals_the_lock() -> None:
    locked = re.search(r"^ray==(\S+)", LOCK, re.M)
    assert locked and _rayjob()["spec"]["rayClusterSpec"]["rayVersion"] == locked[1]


def test_dockerfile_is_pinned_and_not_run_as_root() -> None:
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
    assert command.startswith("["), "exec form, so that the process receives signals"


def test_dockerfile_passes_hadolint() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if hadolint is None:
        pytest.skip("needs hadolint, installed by requirements.lock")
    result = subprocess.run([hadolint, "Dockerfile"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout


def test_docker_build_context_contains_the_copied_files() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for sources in re.findall(r"^COPY (.+) \S+$", text, re.M):
        for source in sources.split():
            assert source in kept and (ROOT / source).exists()


@pytest.mark.parametrize("name", JOBS)
def test_job_is_a_short_wrapper_of_a_command(name: str) -> None:
    path = ROOT / "jobs" / name
    assert len(path.read_text().splitlines()) <= 15
    result = subprocess.run([sys.executable, str(path), "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "Usage" in result.stdout
