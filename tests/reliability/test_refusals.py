"""What cannot work is refused with the right line and exit code 2, by `preflight` and by `train` in its first ten
seconds.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.reliability.harness import say
from tests.unit.train.test_readiness import WRONG, set_up

__all__ = ["set_up"]  # a fixture
SET_UPS = [name for name in WRONG if name != "evaluation not importable"]  # that one is made within a process
LIMIT_S = 10.0


def run(command: str, words: list[str]) -> tuple[int, list[str], float]:
    """Exit code and lines of a command, and its time: that of the processor where others keep it busy."""
    started_s, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "pillsnap.cli", command, *words],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        # The limit that the set-up "files too small" pretends in this process holds in the command.
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, resource.getrlimit(resource.RLIMIT_FSIZE)),
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    worked_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.returncode, (done.stdout + done.stderr).splitlines(), min(worked_s, time.monotonic() - started_s)


@pytest.mark.reliability
@pytest.mark.parametrize("name", SET_UPS)
@pytest.mark.usefixtures("set_up")
def test_commands_refuse_what_cannot_work(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil, expected = WRONG[name]
    assignments = [word for text in spoil(tmp_path, monkeypatch) for word in ("--set", text)]
    words = ["--preset", "demo", "--data-root", str(tmp_path / "photos"), "--manifest", str(tmp_path / "manifest")]
    words += ["--run", str(tmp_path / "run"), *assignments]
    monkeypatch.setenv("COLUMNS", "300")
    code, lines, train_s = run("train", words)
    assert code == 2 and expected in lines[-1] and len(lines) == 1, lines
    code, lines, preflight_s = run("preflight", words)
    assert code == 2, lines
    assert [line for line in lines if line.startswith("no ") and expected.split(": ", 1)[-1] in line], lines
    say(
        train_s <= LIMIT_S, 1, f"{name}: refused by train after {train_s:.1f} s, by preflight after {preflight_s:.1f} s"
    )
