"""A mirror whose driver was killed ends within a limit; one whose driver closes it has the time that it needs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT

SCRIPT = """
import ctypes, threading, time
from pillsnap.tracking import follower
follower.ORPHAN_S = follower._LAST_S = 0.3
lock = ctypes.create_string_buffer(64)

def follow(self, stop):
    print("following", flush=True)
    stop.wait()
    {uploads}

follower.Follower.follow = follow
follower.main()
"""
HANGS = "[ctypes.CDLL(None).pthread_mutex_lock(lock) for _ in range(2)]"


@pytest.mark.parametrize(
    "uploads, killed, ends",
    [("time.sleep(60)", True, True), (HANGS, True, True), ("time.sleep(2.0)", False, False), ("pass", False, True)],
)
def test_end_of_a_mirror(uploads: str, killed: bool, ends: bool, tmp_path: Path) -> None:
    (tmp_path / "wandb").mkdir()
    arguments = {"run_dir": str(tmp_path), "project": "p", "group": None, "mode": "offline"}
    mirror = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(uploads=uploads), json.dumps(arguments)],
        cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert mirror.stderr is not None and mirror.stderr.readline() == "following\n"
    assert mirror.stdin is not None
    if not killed:
        mirror.stdin.write("end\n")
    mirror.stdin.close()
    asked_s = time.monotonic()
    assert mirror.wait(timeout=10) == 0
    assert (time.monotonic() - asked_s < 1.9) == ends
