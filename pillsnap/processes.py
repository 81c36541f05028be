"""Processes: what tells one from a later one with its number, and the variables that new ones inherit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
