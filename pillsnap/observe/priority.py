"""Scheduling priority of observer processes."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_LOWEST = 19


def lower_priority(pid: int = 0) -> None:
    """Give process `pid` (0: this one) the lowest CPU priority, and its session if it leads one.

    Ray workers run at nice 15, so 19 is below them. With the kernel's autogroup, nice values only compare processes
    within one session, and the session's own value compares sessions; a new session inherits nice but not that value.
    The session of another leader, such as a terminal's shell, is left as it is: it may start a training next.
    """
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, pid, _LOWEST)
        if os.getsid(pid) == (pid or os.getpid()):
            Path(f"/proc/{pid or 'self'}/autogroup").write_text(str(_LOWEST))
