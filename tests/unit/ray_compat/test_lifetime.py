"""What a killed driver or raylet leaves is ended: by the kernel at once, by the next start at the latest."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from pillsnap.processes import machine, start_of
from pillsnap.ray_compat import lifetime
from pillsnap.ray_compat.lifetime import end_orphans, lifetime_variables, session_of_this_driver
from tests.conftest import ROOT
from tests.processes import is_running


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Callable[[str, str], psutil.Process]]:
    """Starts processes that write to a log of a session."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(session: str, log: str = "worker-1.out") -> psutil.Process:
        (tmp_path / session / "logs").mkdir(parents=True, exist_ok=True)
        with (tmp_path / session / "logs" / log).open("w") as file:
            processes.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], stdout=file))
        return psutil.Process(processes[-1].pid)

    yield start
    for process in processes:
        process.kill()
        process.wait()


def test_only_sessions_of_killed_drivers_are_ended(
    tmp_path: Path, writer: Callable[..., psutil.Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not those of living drivers, of other machines and containers, of other programs and users, nor drivers."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    marks = {
        "session_dead": f"{machine()} {dead.pid} 1",
        "session_reused": f"{machine()} {os.getpid()} 1",  # its number is another process's now
        "session_live": f"{machine()} {os.getpid()} {start_of(os.getpid())}",
        "session_container": f"other-{machine()} {dead.pid} 1",
        "session_torn": machine(),
        "session_of_another_program": "",
    }
    left = {name: writer(name) for name in marks}
    driver = writer("session_dead", "python-core-driver-1.log")
    for name, mark in marks.items():
        if mark:
            (tmp_path / name / "pillsnap-driver").write_text(mark)
    monkeypatch.setattr(os, "getuid", lambda own=os.getuid(): own + 1)
    end_orphans(tmp_path)
    assert all(process.is_running() for process in left.values())
    monkeypatch.undo()
    end_orphans(tmp_path)
    ended = {name for name, process in left.items() if not is_running(process.pid)}
    assert ended == {"session_dead", "session_reused"}
    assert {path.name for path in tmp_path.iterdir()} == {*marks} - ended
    assert is_running(driver.pid)


def test_nothing_of_a_session_runs_after_it(
    tmp_path: Path, writer: Callable[..., psutil.Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifetime, "_GRACE_S", 0.2)
    process = writer("session_own")
    with session_of_this_driver(tmp_path / "session_own"):
        assert (tmp_path / "session_own" / "pillsnap-driver").read_text().split()[1] == str(os.getpid())
        assert is_running(process.pid)
    assert not is_running(process.pid)
    assert [path.name for path in (tmp_path / "session_own").iterdir()] == ["logs"]


def test_the_kernel_kills_a_worker_with_its_raylet(tmp_path: Path) -> None:
    """And ends a worker whose raylet ended before."""
    raylet = tmp_path / "raylet"
    raylet.symlink_to(sys.executable)
    worker = "from pillsnap.ray_compat.lifetime import end_with_raylet as e; e(); print(0, flush=True); input()"
    script = (
        "import subprocess, sys\n"
        f"worker = subprocess.Popen([{sys.executable!r}, '-c', {worker!r}], stdin=subprocess.PIPE)\n"
        "print(worker.pid, flush=True)\n"
        "worker.wait()\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    for executable, lives in ((raylet, True), (Path(sys.executable), False)):
        parent = subprocess.Popen([executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment)
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert parent.stdout.readline() == ("0\n" if lives else "")  # without a raylet it ends at once
        parent.kill()
        parent.wait()
        give_up_s = time.monotonic() + 5
        while is_running(pid) and time.monotonic() < give_up_s:
            time.sleep(0.02)
        assert not is_running(pid)


def test_workers_without_the_package_get_no_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR

    hook = "pillsnap.ray_compat.lifetime.end_with_raylet"
    assert lifetime_variables() == {WORKER_PROCESS_SETUP_HOOK_ENV_VAR: hook}
    monkeypatch.setattr(lifetime, "__name__", "pillsnap_that_is_not_installed.lifetime")
    assert lifetime_variables() == {}
    monkeypatch.setattr(lifetime.capabilities, "worker_hook", lambda: False)
    assert lifetime_variables() == {}
