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
WITHIN_A_PROCESS = ("evaluation not importable", "files too small")
"""Made by changing modules of this process, which a command does not see."""
SET_UPS = [name for name in WRONG if name not in WITHIN_A_PROCESS]
LIMIT_S, IMPORTS = 10.0, 2.0
"""Seconds that a refusal may take; on a slow machine, that many times what importing torch, Ray and timm takes."""


def run_python(words: list[str]) -> tuple[subprocess.CompletedProcess[str], float]:
    """A finished process of Python, and its seconds: those of the processor where others keep it busy."""
    started_s, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=300, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    worked_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done, min(worked_s, time.monotonic() - started_s)


def run(command: str, words: list[str]) -> tuple[int, list[str], float]:
    """Exit code, lines and seconds of a command."""
    done, seconds = run_python(["-m", "pillsnap.cli", command, *words])
    return done.returncode, (done.stdout + done.stderr).splitlines(), seconds


@pytest.fixture(scope="module")
def import_s() -> float:
    """Seconds to import the libraries that have to be there before anything can be checked."""
    done, seconds = run_python(["-c", "import torch, ray.data, ray.train, timm"])
    assert done.returncode == 0, done.stderr
    return seconds


@pytest.mark.reliability
@pytest.mark.parametrize("name", SET_UPS)
@pytest.mark.usefixtures("set_up")
def test_commands_refuse_what_cannot_work(
    name: str, import_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    seconds = f"by train after {train_s:.1f} s, by preflight after {preflight_s:.1f} s (imports {import_s:.1f} s)"
    say(train_s <= max(LIMIT_S, IMPORTS * import_s), 1, f"{name}: refused {seconds}")
