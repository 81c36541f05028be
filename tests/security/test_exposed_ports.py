"""Ray clusters use token authentication and loopback dashboards, and open no port of Ray."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from pillsnap.errors import UserError
from pillsnap.ray_compat.token import token_variables
from tests.processes import command_line, descendants, is_running, titled

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


def test_every_port_of_the_local_cluster_is_bound_to_loopback(ray_local: None) -> None:
    """Those of Ray's servers, of this process and of a worker."""
    import ray

    ray.get(ray.remote(num_cpus=0)(lambda: None).remote())
    processes = [psutil.Process(), *descendants()]
    listening = {
        (each.laddr.ip, " ".join(command_line(process))[:80])
        for process in processes
        if is_running(process.pid)
        for each in process.net_connections("tcp")
        if each.status == psutil.CONN_LISTEN
    }
    assert len(listening) >= 5
    assert {address for address, _ in listening} <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}, listening


@pytest.mark.parametrize("before", [None, 0o644])
def test_the_token_is_readable_by_its_owner_alone(
    before: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    token = tmp_path / ".ray" / "auth_token"
    if before is not None:
        token.parent.mkdir()
        token.write_text("kept")
        token.chmod(before)
    assert token_variables() == {}
    assert token.stat().st_mode & 0o777 == 0o600
    assert token.read_text() == "kept" if before else len(token.read_text()) == 64
    monkeypatch.setattr("os.getuid", lambda: 12345)
    with pytest.raises(UserError, match=r"auth_token belongs to another user: delete it, or set RAY_AUTH_TOKEN_PATH"):
        token_variables()


def test_the_token_where_the_home_folder_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "home").touch()  # a file: not even root can make a folder in it
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PILLSNAP_CACHE_DIR", str(tmp_path / "cache"))
    assert token_variables() == {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "cache/ray/auth_token")}
    assert (tmp_path / "cache/ray/auth_token").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "cache/ray").stat().st_mode & 0o777 == 0o700


def test_a_token_of_the_user_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "t", "RAY_AUTH_TOKEN_PATH": "/token"}.items():
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert token_variables() == {}
    assert not (tmp_path / ".ray").exists()
