"""How a process that only watches gives way to training."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def give_way() -> None:
    """Let everything else on this machine go first. For a process that leads a session of its own.

    Ray's workers run at a niceness of 15, so 19 is below them. Where the kernel groups processes by session
    (autogroup), niceness only counts within one, and the session's own decides against others.
    """
    os.nice(19)
    with contextlib.suppress(OSError):
        Path("/proc/self/autogroup").write_text("19")
