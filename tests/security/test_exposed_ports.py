"""Ray clusters use token authentication and loopback dashboards, and open no port of Ray."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.processes import command_line, descendants, titled

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER_FILES = ["cluster.yaml", "deploy/aws.yaml"]
RAY_PORTS = {6379, 8265, 10001}  # GCS, dashboard with job API, Ray client: each can run code


def _yaml(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((ROOT / name).read_text(encoding="utf-8")))


def _commands(name: str) -> list[str]:
    (config,) = _yaml(name)
    commands = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    return [command for command in commands if "ray start" in command]


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_every_node_starts_with_token_authentication(name: str) -> None:
    commands = _commands(name)
    assert len(commands) == 2
    for command in commands:
        assert re.search(r"\bRAY_AUTH_MODE=token\b.*\bray start\b", command)
    (config,) = _yaml(name)
    assert any(path.endswith("/.ray/auth_token") for path in config["file_mounts"]), "nodes need the token"


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_the_dashboard_listens_on_loopback(name: str) -> None:
    head = next(command for command in _commands(name) if "--head" in command)
    assert "--dashboard-host=127.0.0.1" in head
    assert "0.0.0.0" not in (ROOT / name).read_text()
    assert "--ray-client-server-port" not in head


def test_no_security_group_rule_opens_a_port_of_ray() -> None:
    """Rules of Ray's security group are unchanged, and no other group replaces it."""
    (config,) = _yaml("deploy/aws.yaml")
    rules = config["provider"].get("security_group", {}).get("IpPermissions", [])
    for rule in rules:
        ports = range(rule.get("FromPort", 0), rule.get("ToPort", 65535) + 1)
        assert not RAY_PORTS & set(ports)
    for group in config["available_node_types"].values():
        assert not {"SecurityGroupIds", "NetworkInterfaces"} & set(group["node_config"])


def test_the_rayjob_has_token_authentication_and_no_external_access() -> None:
    documents = {document["kind"]: document for document in _yaml("deploy/rayjob.yaml")}
    cluster = documents["RayJob"]["spec"]["rayClusterSpec"]
    assert cluster["authOptions"]["mode"] == "token"
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert not cluster["headGroupSpec"].get("enableIngress", False)
    assert not {"Ingress", "Service"} & set(documents)
    policy = documents["NetworkPolicy"]["spec"]
    assert policy["policyTypes"] == ["Ingress"]
    for rule in policy["ingress"]:
        assert rule["from"], "a rule without a source allows every client"
        for source in rule["from"]:
            assert "ipBlock" not in source and "podSelector" in source


def test_the_pods_run_without_privileges() -> None:
    job = next(document for document in _yaml("deploy/rayjob.yaml") if document["kind"] == "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert "ports" not in container or not any("hostPort" in port for port in container["ports"])


def test_no_token_is_committed() -> None:
    for name in [*LAUNCHER_FILES, "deploy/rayjob.yaml", "runtime_env.yaml", "Dockerfile"]:
        assert "RAY_AUTH_TOKEN=" not in (ROOT / name).read_text(), f"{name} contains a token"


def test_the_local_cluster_serves_no_dashboard(ray_local: None) -> None:
    import ray

    assert not ray._private.worker.get_dashboard_url()
    assert not any("dashboard.py" in part for process in descendants() for part in command_line(process))


def test_the_local_cluster_accepts_no_jobs(ray_local: None) -> None:
    """The job API would be served over HTTP by Ray's agent."""
    (agent,) = titled("DashboardAgent")
    assert not [each.laddr for each in agent.net_connections() if each.status == psutil.CONN_LISTEN]
