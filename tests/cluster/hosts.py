"""Several hosts on one machine: each a set of Linux namespaces with its own address, name, processes and /tmp.

A host is a process that is number 1 of its own process namespace: ending it ends all that runs there, as pulling the
plug would. Hosts are joined by pairs of virtual cables to a bridge in a network namespace of its own, so nothing about
the machine's own network changes, and nothing of a host can be reached from it but through `nsenter`.
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
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")

NETWORK = "10.77.0"
_PROGRAM = (Path(__file__).resolve().parents[2], Path(sys.prefix))
_CLONE_NEWNET = 0x40000000
_LIBC = ctypes.CDLL(None, use_errno=True)
_TOOLS = ("ip", "unshare", "nsenter", "mount")
# Process 1 collects what its namespace's daemons leave behind: bash does, sleep alone would not.
_INIT = "while :; do sleep 3600 & wait $!; done"


def why_not() -> str:
    """Why there can be no hosts here; empty where there can."""
    if os.geteuid() != 0:
        return "needs root to make network namespaces"
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        return f"needs {', '.join(missing)}"
    tried = subprocess.run(
        ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--mount-proc", "ip", "link", "add", "br0", "type",
         "bridge"], capture_output=True, text=True,
    )  # fmt: skip
    return "" if tried.returncode == 0 else f"the kernel makes no such namespaces: {tried.stderr.strip()[:100]}"


def cpu_controller() -> Path | None:
    """This process's group of the kernel's processor controller (cgroup v1), below which quotas can be set."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "cpu" in controllers.split(","):
            for mount in (Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup/cpu,cpuacct")):
                group = Path(f"{mount}{path}")
                if (group / "cpu.cfs_quota_us").exists() and os.access(group, os.W_OK):
                    return group
    return None


class Switch:
    """The bridge that hosts are plugged into."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(["unshare", "--net", "bash", "-c", _INIT], start_new_session=True)
        _wait(lambda: _has_own_namespace(self._process.pid, "net"))
        self.run("ip", "link", "set", "lo", "up")
        self.run("ip", "link", "add", "br0", "type", "bridge", "forward_delay", "0")
        self.run("ip", "link", "set", "br0", "up")

    def run(self, *command: str) -> str:
        """Run a command in the bridge's namespace; its output."""
        return _checked(["nsenter", "-t", str(self._process.pid), "--net", "--", *command])

    def plug(self, host: Host) -> None:
        """Lay a cable to a host."""
        self.run("ip", "link", "add", host.port, "type", "veth", "peer", "name", "eth0", "netns", str(host.pid))
        self.run("ip", "link", "set", host.port, "master", "br0", "up")

    def set_link(self, host: Host, up: bool) -> None:
        """Pull a host's cable, or put it back."""
        self.run("ip", "link", "set", host.port, "up" if up else "down")

    def close(self) -> None:
        """Take the bridge away, and with it all cables."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class Host:
    """One host: what is started on it with `run` or `start` sees its network, its processes and its own /tmp.

    `shared` folders lie under the same path on every host, as the program under test does. `cpu_share` holds all that
    runs here to so many cores.
    """

    def __init__(
        self, switch: Switch, name: str, number: int, shared: Sequence[Path], *, cpu_share: float | None = None
    ) -> None:
        self.name, self.ip, self.port = name, f"{NETWORK}.{number}", f"port{number}"
        self._switch = switch
        self.folder = Path(tempfile.mkdtemp(prefix=f"pillsnap-{name}-"))
        """What is this host's /tmp, as this machine sees it."""
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
        """Shell commands that give the host its name, its /tmp and its /dev/shm; nothing of it shows outside."""
        hosts = self.folder / ".hosts"
        # Torch's gloo talks from the address that the host's own name stands for.
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
        """The command line that runs `command` on this host."""
        enter = ["nsenter", "-t", str(self.pid), "--net", "--mount", "--uts", "--ipc", "--pid", "--", *command]
        return self._in_group(enter)

    def run(self, *command: str, **options: Any) -> str:
        """Run a command on this host; its output. Raises CalledProcessError."""
        return _checked(self.command(*command), **options)

    def start(self, *command: str, **options: Any) -> subprocess.Popen:
        """Start a command on this host; it ends with the host."""
        return subprocess.Popen(self.command(*command), start_new_session=True, **options)

    def network_command(self, *command: str) -> list[str]:
        """The command line that runs `command` on this machine with this host's network, as through an SSH tunnel."""
        return ["nsenter", "-t", str(self.pid), "--net", "--", *command]

    def within_network(self, function: Callable[[], Result]) -> Result:
        """What `function` returns when its thread has this host's network: cheaper than a process of its own."""

        def enter() -> Result:
            with open(f"/proc/{self.pid}/ns/net") as namespace:
                if _LIBC.setns(namespace.fileno(), _CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), f"setns: {os.strerror(ctypes.get_errno())}")
            return function()

        with ThreadPoolExecutor(1) as pool:  # the thread ends here, and with it its being elsewhere
            return pool.submit(enter).result()

    def cut(self) -> None:
        """Pull the network cable: no connection is closed, nothing answers any more."""
        self._switch.set_link(self, up=False)

    def mend(self) -> None:
        """Put the cable back."""
        self._switch.set_link(self, up=True)

    def processes(self) -> list[int]:
        """What runs here besides process 1, as this machine numbers them."""
        own = os.readlink(f"/proc/{self.pid}/ns/pid")
        return [pid for pid in _pids() if pid != self.pid and _namespace(pid, "pid") == own]

    def kill(self, what: str) -> int:
        """SIGKILL the processes here whose command line contains `what`; how many there were."""
        doomed = [pid for pid in self.processes() if what in _command_line(pid)]
        for pid in doomed:
            os.kill(pid, signal.SIGKILL)
        return len(doomed)

    def set_share(self, cores: float) -> None:
        """Hold the host to another share of a core than it was made with."""
        assert self._group is not None
        _write_quota(self._group, cores)

    def throttled_s(self) -> float:
        """Seconds that its processes have waited for their next share, all together."""
        assert self._group is not None
        stat = dict(line.split() for line in (self._group / "cpu.stat").read_text().splitlines())
        return int(stat["throttled_time"]) / 1e9

    def close(self) -> None:
        """Switch the host off: its processes, its network and its files go."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        _wait(lambda: not Path(f"/proc/{self.pid}").exists() or _command_line(self.pid) == "")
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._group is not None:
            _wait(lambda: _removed(self._group))


def _quota_group(name: str, cores: float) -> Path:
    parent = cpu_controller()
    assert parent is not None, "look at cpu_controller() before asking for a share"
    group = parent / name
    group.mkdir(exist_ok=True)
    _write_quota(group, cores)
    return group


def _write_quota(group: Path, cores: float) -> None:
    period_us = 20_000  # short, so that a share is even within a batch
    (group / "cpu.cfs_period_us").write_text(str(period_us))
    (group / "cpu.cfs_quota_us").write_text(str(round(cores * period_us)))


def _removed(group: Path) -> bool:
    try:
        group.rmdir()
    except FileNotFoundError:
        return True
    except OSError:  # its last processes are still on their way out
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
            raise TimeoutError(f"nothing came of it within {timeout_s:.0f} s")
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
