"""Scheduling priority of observer processes."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_LOWEST = 19


def lower_priority(pid: int = 0) -> None:
    """Give session leader `pid` (0: this process) the lowest CPU priority.

    Ray workers run at nice 15, so 19 is below them. With the kernel's autogroup, nice values only compare processes
    within one session, and the session's own value compares sessions; a new session inherits nice but not that value.
    """
    with contextlib.suppress(ProcessLookupError):
        os.setpriority(os.PRIO_PROCESS, pid, _LOWEST)
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid or 'self'}/autogroup").write_text(str(_LOWEST))
