"""Processes: what tells one from a later one with its number, the variables that new ones inherit, a quick start and a
quick end.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn


def machine() -> str:
    """Identifies the PID namespace: the kernel's boot and the namespace's inode."""
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}-{os.stat('/proc/self/ns/pid').st_ino}"


def start_of(pid: int) -> str | None:
    """Start time of a process of this machine in kernel ticks; None when it has ended."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].decode().split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in "ZX" else rest[18]


@contextmanager
def added_variables(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables, for this process and those that it starts within; those that the user set stay."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """For work that makes many objects and few cycles: imports of torch and timm take a fifth less time within."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def end_process(code: int) -> NoReturn:
    """Exit with this code: wait for threads and run exit handlers as usual, but leave the modules' memory to the
    kernel. To free it object by object takes a second after torch and timm were imported.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # gone, closed, or never there
            stream.flush()
    os._exit(code)
