"""Nothing of a local cluster outlives its driver: the kernel kills each worker with the raylet that started it, and the
next start kills what an earlier cluster has left.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from pillsnap.processes import machine, start_of
from pillsnap.ray_compat import capabilities
from pillsnap.ray_compat.patches import original, replaced

_DRIVER_FILE = "pillsnap-driver"
"""In the session folder of a local cluster: machine, number and start time of its driver."""
_DRIVERS_LOG = "python-core-driver-"
_GRACE_S = 3.0
CHILD_OF_RAYLET = Path(__file__).with_name("child_of_raylet.py")


@contextmanager
def workers_end_with_raylet() -> Iterator[None]:
    """Have the kernel kill each worker of a cluster started within with its raylet."""
    if not capabilities.worker_command():
        yield
        return
    from ray._private.node import Node

    start = original(Node, "start_raylet")

    def start_raylet(node: Any, *arguments: Any, **named: Any) -> None:
        node._ray_params.setup_worker_path = str(CHILD_OF_RAYLET)  # Ray runs it before each worker's program
        start(node, *arguments, **named)

    with replaced((Node, "start_raylet", start_raylet)):
        yield


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
