"""A process starts without collecting garbage, and ends without freeing its memory object by object."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from pillsnap.processes import without_garbage_collection

ENDING = """
import atexit, sys, threading, time
from pillsnap.processes import end_process
class Freed:
    def __del__(self):
        print("freed")
kept = Freed()
kept.itself = kept
atexit.register(print, "first registered")
atexit.register(print, "last registered")
threading.Thread(target=lambda: (time.sleep(0.3), print("thread"))).start()
sys.stderr.write("unfinished line")
%s
end_process(7)
"""


def ending(change: str = "") -> tuple[int, list[str], str]:
    ended = subprocess.run([sys.executable, "-c", ENDING % change], capture_output=True, text=True, timeout=60)
    return ended.returncode, ended.stdout.splitlines(), ended.stderr


def test_a_process_ends_with_its_handlers_threads_and_output() -> None:
    assert ending() == (7, ["thread", "last registered", "first registered"], "unfinished line")
    assert ending("sys.exit(7)")[:2] == (7, ["thread", "last registered", "first registered", "freed"])


@pytest.mark.parametrize("lost", ["sys.stderr = None", "sys.stderr.close()", "import os; os.close(2)"])
def test_a_process_ends_with_its_code_when_an_output_is_lost(lost: str) -> None:
    assert ending(lost)[:2] == (7, ["thread", "last registered", "first registered"])


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_collection_is_as_before_afterwards(enabled: bool) -> None:
    try:
        (gc.enable if enabled else gc.disable)()
        with pytest.raises(ValueError), without_garbage_collection(), without_garbage_collection():
            assert not gc.isenabled()
            raise ValueError
        assert gc.isenabled() == enabled
    finally:
        gc.enable()
