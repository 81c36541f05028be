"""Where torch.compile does not work, the advice is about what this machine lacks."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

import pytest
import torch

from pillsnap.models import compiling
from pillsnap.models.compiling import compile_problem

CPU = torch.device("cpu")


@pytest.fixture
def _broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("failed\n  to compile")

    monkeypatch.setattr(torch, "compile", fail)


@pytest.mark.usefixtures("_broken")
@pytest.mark.parametrize(
    "lacks, advice",
    [
        ("nothing", ""),
        ("compiler", "install a C++ compiler (Debian and Ubuntu: g++)"),
        ("headers", "install Python's headers (Debian and Ubuntu: python3-dev)"),
        ("programs", "its mount has noexec): set PILLSNAP_CACHE_DIR to another folder"),
    ],
)
def test_advice(lacks: str, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "code"))
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None if lacks == "compiler" else name)
    (tmp_path / "Python.h").touch()
    include = tmp_path / "none" if lacks == "headers" else tmp_path
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(include))
    if lacks == "programs":
        flags = os.ST_NOEXEC | os.ST_NOSUID
        monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result((0, 0, 0, 0, 0, 0, 0, 0, flags, 255)))
    problem = compile_problem(CPU)
    assert problem is not None
    assert problem.reason == "RuntimeError: failed to compile"
    assert problem.advice.endswith(advice) and bool(problem.advice) == bool(advice)
    assert "\n" not in str(problem) and not str(problem).endswith(": ")


def test_a_folder_that_cannot_be_made_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/proc/none")
    problem = compile_problem(CPU, afresh=True)
    assert problem is not None and problem.reason.startswith("FileNotFoundError") and "/proc/none" in problem.reason
