"""Simulated hosts: Linux namespaces with their own address, host name, processes and /tmp.

A host is process 1 of a process namespace: killing it kills everything on the host, like a power failure. veth pairs
connect the hosts to a bridge in a separate network namespace, so the network of the machine is unchanged and hosts are
reachable through `nsenter` only.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")

NETWORK = "10.77.0"
_PROGRAM = (Path(__file__).resolve().parents[2], Path(sys.prefix))
_CLONE_NEWNET = 0x40000000
_LIBC = ctypes.CDLL(None, use_errno=True)
_TOOLS = ("ip", "unshare", "nsenter", "mount")
# Process 1 must reap orphaned processes: bash does, sleep alone would not.
_INIT = "while :; do sleep 3600 & wait $!; done"


def why_not() -> str:
    """Why hosts cannot be created; empty if they can."""
    if os.geteuid() != 0:
        return "needs root for network namespaces"
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        return f"needs {', '.join(missing)}"
    tried = subprocess.run(
        ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--mount-proc", "ip", "link", "add", "br0", "type",
         "bridge"], capture_output=True, text=True,
    )  # fmt: skip
    return "" if tried.returncode == 0 else f"the kernel does not allow namespaces: {tried.stderr.strip()[:100]}"


def cpu_controller() -> Path | None:
    """The CPU cgroup (v1) of this process, if quotas can be set below it."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "cpu" in controllers.split(","):
            for mount in (Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup/cpu,cpuacct")):
                group = Path(f"{mount}{path}")
                if (group / "cpu.cfs_quota_us").exists() and os.access(group, os.W_OK):
                    return group
    return None


class Switch:
    """The bridge that connects the hosts."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(["unshare", "--net", "bash", "-c", _INIT], start_new_session=True)
        _wait(lambda: _has_own_namespace(self._process.pid, "net"))
        self.run("ip", "link", "set", "lo", "up")
        self.run("ip", "link", "add", "br0", "type", "bridge", "forward_delay", "0")
        self.run("ip", "link", "set", "br0", "up")

    def run(self, *command: str) -> str:
        """Run a command in the namespace of the bridge; returns its output."""
        return _checked(["nsenter", "-t", str(self._process.pid), "--net", "--", *command])

    def plug(self, host: Host) -> None:
        """Connect a host."""
        self.run("ip", "link", "add", host.port, "type", "veth", "peer", "name", "eth0", "netns", str(host.pid))
        self.run("ip", "link", "set", host.port, "master", "br0", "up")

    def set_link(self, host: Host, up: bool) -> None:
        """Disconnect a host, or connect it again."""
        self.run("ip", "link", "set", host.port, "up" if up else "down")

    def close(self) -> None:
        """Remove the bridge and all links."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class Host:
    """A host; `run` and `start` execute commands with its network, processes and /tmp.

    `shared` folders and the program under test have the same path on every host. `cpu_share` limits the CPU time of
    the host, in cores.
    """

    def __init__(
        self, switch: Switch, name: str, number: int, shared: Sequence[Path], *, cpu_share: float | None = None
    ) -> None:
        self.name, self.ip, self.port = name, f"{NETWORK}.{number}", f"port{number}"
        self._switch = switch
        self.folder = Path(tempfile.mkdtemp(prefix=f"pillsnap-{name}-"))
        """The /tmp of the host, as a path of this machine."""
        self._group = _quota_group(f"pillsnap-{os.getpid()}-{name}", cpu_share) if cpu_share else None
        command = ["unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child=SIGKILL",
                   "--mount-proc", "bash", "-c", f"{self._set_up(shared)} && {_INIT}"]  # fmt: skip
        self._process = subprocess.Popen(self._in_group(command), start_new_session=True)
        self.pid = _wait(lambda: _first_child(self._process.pid))
        _wait(lambda: (self.folder / ".ready").exists())
        switch.plug(self)
        for words in (f"addr add {self.ip}/24 dev eth0", "link set eth0 up", "link set lo up"):
            self.run("ip", *words.split())

    def _set_up(self, shared: Sequence[Path]) -> str:
        """Shell commands that set host name, /tmp and /dev/shm, invisible outside of the host."""
        hosts = self.folder / ".hosts"
        # Gloo binds to the address that the host name resolves to.
        hosts.write_text(f"127.0.0.1 localhost\n{self.ip} {self.name}\n")
        steps = [f"hostname {self.name}", "mount --make-rprivate /", "mount -t tmpfs -o size=1g shm /dev/shm",
                 f"mount --bind {hosts} /etc/hosts"]  # fmt: skip
        for path in (*_PROGRAM, *shared):
            if path.is_relative_to("/tmp"):
                inside = self.folder / path.relative_to("/tmp")
                inside.mkdir(parents=True, exist_ok=True)
                steps.append(f"mount --bind {path} {inside}")
        return " && ".join([*steps, f"mount --rbind {self.folder} /tmp", "touch /tmp/.ready"])

    def _in_group(self, command: list[str]) -> list[str]:
        if self._group is None:
            return command
        return ["bash", "-c", f'echo $$ > {self._group}/cgroup.procs && exec "$@"', "in-group", *command]

    def command(self, *command: str) -> list[str]:
        """Command line to run `command` on this host."""
        enter = ["nsenter", "-t", str(self.pid), "--net", "--mount", "--uts", "--ipc", "--pid", "--", *command]
        return self._in_group(enter)

    def run(self, *command: str, **options: Any) -> str:
        """Run a command on this host; returns its output. Raises RuntimeError."""
        return _checked(self.command(*command), **options)

    def start(self, *command: str, **options: Any) -> subprocess.Popen:
        """Start a command on this host; it is killed with the host."""
        return subprocess.Popen(self.command(*command), start_new_session=True, **options)

    def network_command(self, *command: str) -> list[str]:
        """Command line to run `command` on this machine with the network of this host, like an SSH tunnel."""
        return ["nsenter", "-t", str(self.pid), "--net", "--", *command]

    def within_network(self, function: Callable[[], Result]) -> Result:
        """Call `function` in a thread with the network of this host."""

        def enter() -> Result:
            with open(f"/proc/{self.pid}/ns/net") as namespace:
                if _LIBC.setns(namespace.fileno(), _CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), f"setns: {os.strerror(ctypes.get_errno())}")
            return function()

        with ThreadPoolExecutor(1) as pool:  # a separate thread, since setns cannot be undone
            return pool.submit(enter).result()

    def disconnect(self) -> None:
        """Disconnect the network without closing connections."""
        self._switch.set_link(self, up=False)

    def reconnect(self) -> None:
        """Connect the network again."""
        self._switch.set_link(self, up=True)

    def processes(self) -> list[int]:
        """Processes of the host except process 1, by their ids on this machine."""
        own = os.readlink(f"/proc/{self.pid}/ns/pid")
        return [pid for pid in _pids() if pid != self.pid and _namespace(pid, "pid") == own]

    def kill(self, text: str) -> int:
        """SIGKILL the processes whose command line contains `text`; returns their number."""
        pids = [pid for pid in self.processes() if text in _command_line(pid)]
        for pid in pids:
            with suppress(ProcessLookupError):  # it may have ended with the one before
                os.kill(pid, signal.SIGKILL)
        return len(pids)

    def set_share(self, cores: float) -> None:
        """Change the CPU limit of the host."""
        assert self._group is not None
        _write_quota(self._group, cores)

    def throttled_s(self) -> float:
        """Total seconds that its processes were throttled."""
        assert self._group is not None
        stat = dict(line.split() for line in (self._group / "cpu.stat").read_text().splitlines())
        return int(stat["throttled_time"]) / 1e9

    def close(self) -> None:
        """Kill the processes of the host and remove its network and files."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        _wait(lambda: not Path(f"/proc/{self.pid}").exists() or _command_line(self.pid) == "")
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._group is not None:
            _wait(lambda: _removed(self._group))


def _quota_group(name: str, cores: float) -> Path:
    parent = cpu_controller()
    assert parent is not None, "check cpu_controller() before setting a share"
    group = parent / name
    group.mkdir(exist_ok=True)
    _write_quota(group, cores)
    return group


def _write_quota(group: Path, cores: float) -> None:
    period_us = 20_000  # short, so that throttling is even within a batch
    (group / "cpu.cfs_period_us").write_text(str(period_us))
    (group / "cpu.cfs_quota_us").write_text(str(round(cores * period_us)))


def _removed(group: Path) -> bool:
    try:
        group.rmdir()
    except FileNotFoundError:
        return True
    except OSError:  # its last processes are still exiting
        return False
    return True


def _checked(command: list[str], **options: Any) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def _wait(condition: Any, timeout_s: float = 60.0) -> Any:
    give_up_s = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > give_up_s:
            raise TimeoutError(f"timed out after {timeout_s:.0f} s")
        time.sleep(0.02)
    return value


def _pids() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdecimal()]


def _namespace(pid: int, kind: str) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/{kind}")
    except OSError:
        return ""


def _has_own_namespace(pid: int, kind: str) -> bool:
    return _namespace(pid, kind) not in ("", _namespace(os.getpid(), kind))


def _first_child(pid: int) -> int | None:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return None
    return int(children[0]) if children else None


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
