"""Freed memory stays in the process and is reused, until it is returned to the kernel."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt and malloc_trim are glibc's")

_KEEP = """
import sys
import numpy as np
import psutil
from pillsnap.data.malloc import keep_freed_memory
if sys.argv[1] == "1":
    keep_freed_memory()
memory = psutil.Process().memory_info
before = memory().rss
large = np.ones(100_000_000, np.uint8)
del large
print(memory().rss - before)
"""

_RETURN = """
import sys
import psutil
import pyarrow  # imported before the measurement
from pillsnap.data.malloc import return_freed_memory
memory = psutil.Process().memory_info
blocks = [bytes(1000) for _ in range(200_000)]
kept = blocks[::1000]  # between the freed blocks, so that free() alone returns nothing
before = memory().rss
del blocks
if sys.argv[1] == "1":
    return_freed_memory()
print(before - memory().rss)
"""


def measured_bytes(code: str, *, call: bool) -> int:
    command = [sys.executable, "-c", code, str(int(call))]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_freed_array_stays_in_the_process() -> None:
    assert measured_bytes(_KEEP, call=True) > 95e6  # of 100 MB
    assert measured_bytes(_KEEP, call=False) < 10e6


def test_freed_blocks_are_returned_to_the_kernel() -> None:
    assert measured_bytes(_RETURN, call=True) > 150e6  # of 200 MB
    assert measured_bytes(_RETURN, call=False) < 50e6
