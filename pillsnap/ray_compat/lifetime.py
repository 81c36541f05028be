"""Nothing of a local cluster outlives its driver: the kernel kills each worker with the raylet that started it, and the
next start kills what an earlier cluster has left.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from pillsnap.processes import machine, start_of
from pillsnap.ray_compat import capabilities

_DRIVER_FILE = "pillsnap-driver"
"""In the session folder of a local cluster: machine, number and start time of its driver."""
_DRIVERS_LOG = "python-core-driver-"
_GRACE_S = 3.0
_PR_SET_PDEATHSIG = 1


def lifetime_variables() -> dict[str, str]:
    """The variable by which Ray runs `end_with_raylet` in each worker, those started beforehand included.

    Empty where a new process cannot import it, as in a source folder that is not installed: Ray would end its workers.
    """
    if not capabilities.worker_hook():
        return {}
    from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR

    imports = subprocess.run([sys.executable, "-c", f"import {__name__}"], cwd="/", capture_output=True, check=False)
    hook = f"{__name__}.{end_with_raylet.__name__}"
    return {} if imports.returncode else {WORKER_PROCESS_SETUP_HOOK_ENV_VAR: hook}


def end_with_raylet() -> None:
    """Have the kernel kill this worker when its raylet ends.

    By themselves, busy and idle workers were still there 98 s after a SIGKILL of their raylet.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if Path(f"/proc/{os.getppid()}/comm").read_text() != "raylet\n":  # it has ended already
        os._exit(1)


def agent_command(command: list[str]) -> list[str]:
    """The start of an agent's command line, so that the kernel kills the agent with its raylet. By itself it first
    waits to report the end of the raylet to the GCS, which has ended too.
    """
    start = (
        "import ctypes, runpy, sys; "
        f"ctypes.CDLL(None).prctl({_PR_SET_PDEATHSIG}, {int(signal.SIGKILL)}); "
        "del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    return [*command, "-c", start]


@contextmanager
def session_of_this_driver(folder: Path) -> Iterator[None]:
    """Name this process as the driver of a session within the body; at its end, nothing else of the session runs.

    Ends what the sessions of killed drivers have left.
    """
    mark = folder / _DRIVER_FILE
    mark.write_text(f"{machine()} {os.getpid()} {start_of(os.getpid())}")
    end_orphans(folder.parent)
    try:
        yield
    finally:
        _end_processes(folder, _GRACE_S)
        mark.unlink(missing_ok=True)


def end_orphans(sessions: Path) -> None:
    """Kill the processes of this user's sessions whose driver was killed, and remove those sessions."""
    for mark in sessions.glob(f"session_*/{_DRIVER_FILE}"):
        with contextlib.suppress(OSError, ValueError):  # another command may remove it, too
            where, pid, started = mark.read_text().split()
            if mark.stat().st_uid == os.getuid() and where == machine() and start_of(int(pid)) != started:
                _end_processes(mark.parent, 0.0)
                shutil.rmtree(mark.parent, ignore_errors=True)


def _end_processes(folder: Path, grace_s: float) -> None:
    """Wait for the processes of a session, which may deadlock at their exit, and kill those that stay."""
    _, left = psutil.wait_procs([process for process in psutil.process_iter() if _is_of(process, folder)], grace_s)
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(left, _GRACE_S)


def _is_of(process: psutil.Process, folder: Path) -> bool:
    """Whether Ray or one of its workers started this process of the user for that session: it writes to its logs."""
    try:
        if process.uids().real != os.getuid():
            return False
        logs = [Path(file.path) for file in process.open_files() if Path(file.path).is_relative_to(folder)]
    except psutil.Error:  # it has ended, or is protected
        return False
    return bool(logs) and not any(log.name.startswith(_DRIVERS_LOG) for log in logs)
