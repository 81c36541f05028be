"""Observer processes run at the lowest CPU priority."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pillsnap.observe.priority import lower_priority
from tests.conftest import ROOT


@pytest.fixture
def session_leader() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "60"], start_new_session=True)
    yield process
    process.kill()
    process.wait()


def test_only_the_given_process_is_lowered(session_leader: subprocess.Popen[bytes]) -> None:
    own, other = psutil.Process(), psutil.Process(session_leader.pid)
    before = own.nice()
    assert other.nice() == before < 19, "needs a test process above the lowest priority"
    lower_priority(other.pid)
    assert (own.nice(), other.nice()) == (before, 19)
    autogroup = Path(f"/proc/{other.pid}/autogroup")
    if autogroup.exists() and autogroup.read_text():
        assert autogroup.read_text().split()[-2:] == ["nice", "19"]
    lower_priority(other.pid)
    assert other.nice() == 19


def test_the_session_of_another_leader_is_left_as_it_is() -> None:
    command = [
        sys.executable,
        "-c",
        "from pillsnap.observe.priority import lower_priority as lower; lower(); import os; print(os.nice(0))",
    ]
    shell = f"{shlex.join(command)}; cat /proc/$$/autogroup 2>/dev/null || true"
    nice, *session = subprocess.run(
        ["bash", "-c", shell], start_new_session=True, capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout.splitlines()
    assert nice == "19"
    assert not session or session[0].split()[-2:] == ["nice", "0"]


def test_a_process_that_has_ended_is_ignored(session_leader: subprocess.Popen[bytes]) -> None:
    session_leader.kill()
    session_leader.wait()
    lower_priority(session_leader.pid)
