"""Freed memory serves again: a large array that is taken a second time costs no page faults. Until it is given back."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

_COUNT = """
import resource, sys
import numpy as np
from pillsnap.data.malloc import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(3):
    np.ones(10_000_000, np.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    np.ones(10_000_000, np.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

_RETURN = """
import psutil, sys
import pyarrow  # no part of what is measured
from pillsnap.data.malloc import return_freed_memory
memory = psutil.Process().memory_info
blocks = [bytes(1000) for _ in range(200_000)]
kept = blocks[::1000]  # lie among them, so that free() alone gives nothing back
before = memory().rss
del blocks
if sys.argv[1] == "return":
    return_freed_memory()
print(before - memory().rss)
"""


def faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", _COUNT, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="sets what only glibc has")
def test_memory_that_was_freed_is_taken_again() -> None:
    # 20 arrays of 2,441 pages; the kernel may hand pages out in larger pieces, but then it hands out none either.
    kept, control = faults("keep"), faults("not")
    assert kept <= 200
    assert kept <= control


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="takes what only glibc has")
def test_memory_that_was_freed_is_given_back() -> None:
    returned, control = (
        int(subprocess.run([sys.executable, "-c", _RETURN, how], capture_output=True, text=True, check=True).stdout)
        for how in ("return", "not")
    )
    assert returned > 150e6  # of 200 MB
    assert control < 50e6
