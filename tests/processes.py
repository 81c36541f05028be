"""Descendant processes, any of which may end at any time."""

from __future__ import annotations

import psutil


def descendants(pid: int | None = None) -> list[psutil.Process]:
    """All descendants of a process (default: this one); empty if it has ended."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def command_line(process: psutil.Process) -> list[str]:
    """Command line of a process; empty once it has ended, zombies included."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:  # a zombie too
        return []


def titled(title: str, pid: int | None = None) -> list[psutil.Process]:
    """The descendants whose command line contains `title`."""
    return [process for process in descendants(pid) if title in " ".join(command_line(process))]


def is_running(pid: int) -> bool:
    """Whether a process is running; zombies are not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
