"""How a process that only watches gives way to training."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_LOWEST = 19


def give_way(pid: int = 0) -> None:
    """Let everything else on this machine go before process `pid` (0: this one), which leads a session of its own.

    Ray's workers run at a niceness of 15, so 19 is below them. Where the kernel groups processes by session
    (autogroup), niceness only counts within one, and the session's own decides against others; a child that leads a
    new session takes over the first and not the second.
    """
    with contextlib.suppress(ProcessLookupError):
        os.setpriority(os.PRIO_PROCESS, pid, _LOWEST)
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid or 'self'}/autogroup").write_text(str(_LOWEST))
