"""Identity of processes: what tells one from a later one with its number."""

from __future__ import annotations

import os
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
