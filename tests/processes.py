"""The processes below one, of which any may end while it is looked at."""

from __future__ import annotations

import psutil


def descendants(pid: int | None = None) -> list[psutil.Process]:
    """All processes below one, this one unless named; none if it has ended."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def command_line(process: psutil.Process) -> list[str]:
    """What a process was started with; empty once it has ended, whether or not its parent has noticed."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:  # a zombie too
        return []


def titled(title: str, pid: int | None = None) -> list[psutil.Process]:
    """The descendants whose command line contains `title`."""
    return [process for process in descendants(pid) if title in " ".join(command_line(process))]


def is_running(pid: int) -> bool:
    """Whether a process does something still: one that ended may wait for its parent to notice."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
