"""Simulated hosts are isolated, can be disconnected and reconnected, and are removed completely."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.hosts import Host, Switch, cpu_controller, why_not
from tests.processes import is_running
from tests.reliability.harness import wait_for

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())


def machine() -> tuple[str, str]:
    """Network devices with addresses, and mounts of this machine; hosts must not change them."""
    network = subprocess.run(["ip", "-brief", "address"], capture_output=True, text=True, check=True).stdout
    return network, Path("/proc/self/mountinfo").read_text()


def reaches(host: Host, other: Host) -> bool:
    """Whether one host can connect to port 8000 of the other within two seconds."""
    try:
        host.run("timeout", "2", "bash", "-c", f"exec 3<>/dev/tcp/{other.ip}/8000")
    except RuntimeError:
        return False
    return True


def test_hosts_are_isolated_and_removed_completely(tmp_path: Path) -> None:
    before = machine()
    switch = Switch()
    hosts = [Host(switch, f"host{number}", number, [tmp_path]) for number in (1, 2)]
    one, two = hosts
    try:
        assert [host.run("hostname").strip() for host in hosts] == ["host1", "host2"]
        one.run("touch", "/tmp/mine", str(tmp_path / "ours"), "/dev/shm/mine")
        assert "ours" in two.run("ls", str(tmp_path)) and (tmp_path / "ours").exists()
        assert "mine" not in two.run("ls", "/tmp", "/dev/shm") and not Path("/tmp/mine").exists()
        server = two.start(sys.executable, "-S", "-m", "http.server", "--bind", two.ip, "8000",
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        give_up_s = time.monotonic() + 60
        while not reaches(one, two):
            assert time.monotonic() < give_up_s and server.poll() is None
        two.disconnect()
        assert not reaches(one, two)
        two.reconnect()
        assert reaches(one, two)
        assert machine() == before
        assert two.kill("http.server") == 1
        assert server.wait(timeout=60) != 0
        kept = [pid for host in hosts for pid in (host.pid, *host.processes())]
    finally:
        for host in hosts:
            host.close()
        switch.close()
    assert machine() == before
    assert not any(host.folder.exists() for host in hosts)
    wait_for(lambda: not [pid for pid in kept if is_running(pid)], 10, "end of the hosts' processes")


@pytest.mark.skipif(cpu_controller() is None, reason="the cgroup of this process does not support CPU quotas")
def test_cpu_share_limits_a_host() -> None:
    switch = Switch()
    host = Host(switch, "slow", 3, [], cpu_share=0.25)
    try:
        start_s = time.monotonic()
        spin = "import time\nwhile time.process_time() < 0.5: pass"
        host.run(sys.executable, "-S", "-c", spin)
        assert time.monotonic() - start_s > 0.5 / 0.25 * 0.9
    finally:
        host.close()
        switch.close()
    group = cpu_controller()
    assert group is not None and not list(group.glob("pillsnap-*-slow"))
