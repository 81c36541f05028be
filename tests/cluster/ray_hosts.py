"""A Ray cluster on simulated hosts, started like by cluster.yaml, and jobs submitted to it."""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster.hosts import Host, Switch

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.prefix) / "bin"
_WITHOUT_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))
DASHBOARD = "http://127.0.0.1:8265"
_TRIES = 5
_OBJECT_STORE_BYTES = 200 * 2**20


@dataclass(frozen=True)
class Job:
    """State of a Ray job."""

    status: str
    message: str
    exit_code: int | None
    error_type: str | None

    @property
    def ended(self) -> bool:
        return self.status in ("SUCCEEDED", "FAILED", "STOPPED")


class RayHosts:
    """A head without CPUs and workers with `cpus` each, one raylet per host, with token authentication.

    `environment` is added to that of `ray start` on every host. The context manager removes everything on exit.
    """

    def __init__(
        self,
        shared: Sequence[Path],
        *,
        workers: int = 2,
        cpus: float = 1,
        cpu_share: float | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        self._shared = [*shared, ROOT, Path(sys.prefix), Path(sys.base_prefix)]
        self._num_workers, self._cpus, self._cpu_share = workers, cpus, cpu_share
        self.token = secrets.token_hex(32)
        self._token_file = Path(tempfile.mkstemp(prefix="pillsnap-token-")[1])
        self._token_file.write_text(self.token)
        self._environment = environment or {}
        self.head: Host
        self.workers: list[Host] = []
        self._raylets: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> RayHosts:
        self._switch = Switch()
        try:
            self.head = self._host("head", 1)
            self.workers = [self._host(f"worker{n}", 10 + n, self._cpu_share) for n in range(1, self._num_workers + 1)]
            for number, host in enumerate((self.head, *self.workers), start=1):
                self.join(host, number)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for host in (*self.workers, *([self.head] if hasattr(self, "head") else [])):
            host.close()
        for raylet in self._raylets.values():
            raylet.wait(timeout=30)
        self._switch.close()
        self._token_file.unlink(missing_ok=True)

    def _host(self, name: str, number: int, cpu_share: float | None = None) -> Host:
        host = Host(self._switch, name, number, self._shared, cpu_share=cpu_share)
        (host.folder / "auth_token").write_text(self.token)
        return host

    def environment(self) -> dict[str, str]:
        """Environment of every process of the cluster."""
        kept = {name: os.environ[name] for name in ("LANG", "LC_ALL") if name in os.environ}
        return kept | {
            "HOME": "/tmp",  # separate on each host: no shared caches
            "PATH": f"{BIN}:/usr/sbin:/usr/bin:/sbin:/bin",
            "PYTHONPATH": str(ROOT),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": "/tmp/auth_token",
            "RAY_USAGE_STATS_ENABLED": "0",
            "WANDB_MODE": "offline",
            "YOLO_OFFLINE": "1",
            "YOLO_CONFIG_DIR": "/tmp/yolo",
            "OMP_NUM_THREADS": "1",
        } | self._environment  # fmt: skip

    def start_ray(self, host: Host) -> None:
        """`ray start --block` on a host, as under a service manager."""
        command = [str(BIN / "ray"), "start", "--block", f"--node-ip-address={host.ip}",
                   f"--object-store-memory={_OBJECT_STORE_BYTES}", "--min-worker-port=10002", "--max-worker-port=19999",
                   "--disable-usage-stats"]  # fmt: skip
        if host is self.head:
            command += ["--head", "--port=6379", "--num-cpus=0", "--dashboard-host=127.0.0.1"]
        else:
            command += [f"--address={self.head.ip}:6379", f"--num-cpus={self._cpus:g}"]
        with open(host.folder / "ray-start.log", "ab") as log:
            self._raylets[host.name] = host.start(
                *command, env=self.environment(), stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
            )

    def leave(self, host: Host) -> None:
        """Kill the remaining Ray processes of a lost host, as its service manager would."""
        host.kill("ray")
        self._raylets[host.name].wait(timeout=60)

    def stop_ray(self, host: Host) -> None:
        """SIGKILL the raylet and thereby its workers."""
        assert host.kill("raylet/raylet") >= 1
        self._raylets[host.name].wait(timeout=60)

    def get(self, path: str) -> Any:
        """GET from the dashboard of the head, as through an SSH tunnel. Raises OSError."""
        request = urllib.request.Request(f"{DASHBOARD}{path}", headers={"Authorization": f"Bearer {self.token}"})

        def read() -> bytes:
            with _WITHOUT_PROXY.open(request, timeout=60) as answer:
                return answer.read()

        return json.loads(self.head.within_network(read))

    def nodes(self) -> list[dict[str, Any]]:
        """Nodes that the cluster considers alive."""
        found = self.get("/nodes?view=summary")["data"]["summary"]
        return [node for node in found if node["raylet"].get("state") == "ALIVE"]

    def wait_for_nodes(self, number: int, timeout_s: float = 600.0) -> float:
        """Wait until exactly `number` nodes are alive; returns the seconds waited."""
        return self.wait(lambda: len(self.nodes()) == number, timeout_s, f"{number} nodes")

    def join(self, host: Host, number: int) -> None:
        """Start Ray on a host until `number` nodes are alive; retries after its 30 s timeout."""
        for _ in range(_TRIES):
            self.start_ray(host)
            raylet = self._raylets[host.name]
            self.wait(lambda: raylet.poll() is not None or len(self.nodes()) == number, 600, f"{number} nodes")  # noqa: B023
            if raylet.poll() is None:
                return
        raise RuntimeError(f"ray start failed\n{self.logs_of_start()}")

    def wait(self, condition: Any, timeout_s: float, what: str) -> float:
        """Wait until `condition` is true; returns the seconds waited."""
        start_s = time.monotonic()
        while True:
            try:
                if condition():
                    return time.monotonic() - start_s
            except (OSError, ValueError, KeyError):
                pass  # the dashboard is not up yet
            if time.monotonic() - start_s > timeout_s:
                raise TimeoutError(f"no {what} within {timeout_s:.0f} s\n{self.logs_of_start()}")
            time.sleep(0.5)

    def logs_of_start(self) -> str:
        """Last output of `ray start` on every host."""
        hosts = [self.head, *self.workers]
        return "\n".join(f"{h.name}: {_tail(h.folder / 'ray-start.log')}" for h in hosts)

    def cli(self, *command: str, timeout_s: float = 600.0) -> subprocess.CompletedProcess:
        """Run a `ray` command outside of the cluster, through the tunnel to the dashboard."""
        environment = self.environment() | {"RAY_AUTH_TOKEN_PATH": str(self._token_file)}
        return subprocess.run(
            self.head.network_command(str(BIN / "ray"), *command),
            env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s,
        )  # fmt: skip

    def submit(self, *entrypoint: str, job_id: str, variables: dict[str, str] | None = None) -> str:
        """`ray job submit` without waiting, as documented in docs/cluster.md."""
        environment = ["--runtime-env", "runtime_env.yaml"]
        if variables:
            import yaml

            values = yaml.safe_load((ROOT / "runtime_env.yaml").read_text())
            values["env_vars"] |= variables
            environment = ["--runtime-env-json", json.dumps(values)]
        done = self.cli(
            "job", "submit", "--address", DASHBOARD, "--no-wait", "--submission-id", job_id,
            "--working-dir", ".", *environment, "--", *entrypoint,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"ray job submit: {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-3000:]}")
        return job_id

    def job(self, job_id: str) -> Job:
        """State of a job."""
        details = self.get(f"/api/jobs/{job_id}")
        return Job(details["status"], details["message"] or "", details["driver_exit_code"], details["error_type"])

    def wait_for_job(self, job_id: str, timeout_s: float) -> Job:
        """Wait until a job has ended."""
        try:
            self.wait(lambda: self.job(job_id).ended, timeout_s, f"end of {job_id}")
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{self.job(job_id)}\n{self.logs(job_id)[-4000:]}") from None
        return self.job(job_id)

    def logs(self, job_id: str) -> str:
        """Output of a job."""
        return self.get(f"/api/jobs/{job_id}/logs")["logs"]


def cluster_file_environment() -> dict[str, str]:
    """The RAY_health_check_ variables of cluster.yaml."""
    text = (ROOT / "cluster.yaml").read_text(encoding="utf-8")
    found = dict(re.findall(r"(RAY_health_check_\w+)=(\d+)", text))
    assert len(found) == 3
    return found


def _tail(path: Path) -> str:
    return path.read_text(errors="replace")[-800:] if path.exists() else ""
