"""glibc's handling of freed memory: kept in processes that allocate the same large arrays again and again, returned
to the kernel when such work ends.
"""

from __future__ import annotations

import contextlib
import ctypes
from functools import lru_cache

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_BYTES_KEPT = 2**28


@lru_cache(maxsize=1)
def keep_freed_memory() -> None:
    """Let glibc reuse freed memory for large arrays instead of mapping new pages. No-op without glibc.

    First access to a page costs a page fault: 47,601 per training step on a CPU, 2,667 with this (and 18 to 31 % less
    user time, benchmarks/log/training.md).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_M_TOP_PAD, _BYTES_KEPT)


def return_freed_memory() -> None:
    """Return freed memory to the kernel, Arrow's pool included; without glibc only that pool."""
    import pyarrow as pa

    pa.default_memory_pool().release_unused()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
