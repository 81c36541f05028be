"""Memory that a process has freed: kept for work that takes and gives back the same large arrays over and over, and
given back to the kernel when that work is over.
"""

from __future__ import annotations

import contextlib
import ctypes
from functools import lru_cache

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_BYTES_KEPT = 2**28


@lru_cache(maxsize=1)
def keep_freed_memory() -> None:
    """Let glibc serve large arrays from memory that was used before, instead of from fresh pages of the kernel.

    Every page that is touched for the first time costs a fault: with them, a decoded photo or a batch takes up to a
    tenth longer, and two threads of one process wait for each other. Elsewhere than on glibc nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_M_TOP_PAD, _BYTES_KEPT)


def return_freed_memory() -> None:
    """Give the kernel what this process has freed, Arrow's pool included. Elsewhere than on glibc that pool alone."""
    import pyarrow as pa

    pa.default_memory_pool().release_unused()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
