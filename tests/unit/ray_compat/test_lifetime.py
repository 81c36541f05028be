"""What a killed driver or raylet leaves is ended: by the kernel at once, by the next start at the latest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from pillsnap.processes import machine, start_of
from pillsnap.ray_compat import lifetime, patches
from pillsnap.ray_compat.lifetime import (
    CHILD_OF_RAYLET,
    end_orphans,
    session_of_this_driver,
    workers_end_with_raylet,
)
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


@pytest.fixture
def started_by(tmp_path: Path) -> Iterator[Callable[..., tuple[subprocess.Popen[str], int, str]]]:
    """Starts child_of_raylet.py from a process of that name; returns that, the child's number and its first line."""
    (tmp_path / "raylet").symlink_to(sys.executable)
    script = (
        "import subprocess, sys\n"
        "child = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE)\n"
        "print(child.pid, flush=True)\n"
        "child.wait()\n"
    )
    parents: list[subprocess.Popen[str]] = []

    def start(name: str, *words: str) -> tuple[subprocess.Popen[str], int, str]:
        command = [tmp_path / name if name == "raylet" else name, "-c", script, sys.executable, CHILD_OF_RAYLET, *words]
        parents.append(parent := subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert parent.stdout is not None
        return parent, int(parent.stdout.readline()), parent.stdout.readline()

    yield start
    for parent in parents:
        parent.kill()
        parent.communicate()


def test_the_kernel_kills_a_worker_with_its_raylet(
    tmp_path: Path, started_by: Callable[..., tuple[subprocess.Popen[str], int, str]]
) -> None:
    """And ends a worker whose raylet ended before. Garbage is collected seldom, for the sake of its imports."""
    program = tmp_path / "program.py"
    program.write_text("import gc; print(gc.get_threshold()[0], flush=True); input()")
    for parent_name, line in (("raylet", "10000\n"), (sys.executable, "")):
        parent, pid, printed = started_by(parent_name, str(program))
        assert printed == line
        parent.kill()
        give_up_s = time.monotonic() + 5
        while is_running(pid) and time.monotonic() < give_up_s:
            time.sleep(0.02)
        assert not is_running(pid)


def context(**fields: Any) -> str:
    """The argument by which the raylet passes a runtime environment."""
    from ray._private.runtime_env.context import RuntimeEnvContext

    return f"--serialized-runtime-env-context={RuntimeEnvContext(**fields).serialize()}"


@pytest.mark.parametrize(
    ("words", "program", "arguments"),
    [
        (["worker.py", "--a", "--language=PYTHON"], "worker.py", ["--a"]),
        (["-s", "worker.py", "--a", "--language=PYTHON"], "worker.py", ["--a"]),
        (["agent.py", "--a"], "agent.py", ["--a"]),
        (["worker.py", "--language=PYTHON", context(env_vars={"RAY_A": "1"}), "--b"], "worker.py", ["--b", "RAY_A=1"]),
        (["-s", "worker.py", context(env_vars={"RAY_A": "1"})], "worker.py", ["RAY_A=1"]),
        *(
            (
                ["-s", "worker.py", "--language=PYTHON", other],
                "setup_worker.py",
                ["-s", "worker.py", "--language=PYTHON", other],
            )
            for other in (
                context(env_vars={"RAY_A": "${RAY_B}"}),
                context(env_vars={"RAY_A": "1", "PYTHONPATH": "/a"}),
                context(py_executable="/other"),
                context(command_prefix=["cd /a &&"]),
            )
        ),
    ],
)
def test_the_program_runs_as_ray_would_run_it(
    tmp_path: Path,
    started_by: Callable[..., tuple[subprocess.Popen[str], int, str]],
    words: list[str],
    program: str,
    arguments: list[str],
) -> None:
    for name in ("worker.py", "agent.py", "setup_worker.py"):
        (tmp_path / name).write_text(
            "import json, os, sys, token\n"
            "variables = [f'RAY_A={os.environ[name]}' for name in os.environ if name == 'RAY_A']\n"
            "print(json.dumps([*sys.argv, *variables, token.__file__]))"
        )
    in_folder = [str(tmp_path / word) if word.endswith(".py") else word for word in words]
    _, _, printed = started_by("raylet", *in_folder)
    *found, token_module = json.loads(printed)
    assert found == [str(tmp_path / word) if word.endswith(".py") else word for word in [program, *arguments]]
    assert "pillsnap" not in token_module, "the standard library's"


def test_workers_are_started_as_children_of_the_raylet(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private.node import Node

    seen: list[tuple[str, tuple[int, ...]]] = []
    monkeypatch.setattr(patches, "_patches", {})  # while another test's cluster is up
    monkeypatch.setattr(lifetime.capabilities, "worker_command", lambda: True)
    monkeypatch.setattr(
        Node, "start_raylet", lambda node, *numbers: seen.append((node._ray_params.setup_worker_path, numbers))
    )
    node: Any = SimpleNamespace(_ray_params=SimpleNamespace(setup_worker_path="Ray's"))
    with workers_end_with_raylet():
        Node.start_raylet(node, 1, 2)
    assert seen == [(str(CHILD_OF_RAYLET), (1, 2))]
    assert "setup_worker.py" not in CHILD_OF_RAYLET.name, "Ray skips a program of that name"
    monkeypatch.setattr(lifetime.capabilities, "worker_command", lambda: False)
    node._ray_params.setup_worker_path = "Ray's"
    with workers_end_with_raylet():
        Node.start_raylet(node)
    assert seen[1] == ("Ray's", ())
