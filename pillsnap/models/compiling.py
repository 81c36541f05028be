"""torch.compile: whether it is wanted, works here, and what to do where it does not."""

from __future__ import annotations

import os
import shutil
import sysconfig
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch

from pillsnap.caches import CACHE_ENV, keep_compiled_code_private, new_compile_caches
from pillsnap.config import TrainSettings


def wants_compiling(train: TrainSettings, device: torch.device) -> bool:
    """Whether `train.compile` asks for compilation on this device; `auto` means on a GPU."""
    return train.compile == "on" or (train.compile == "auto" and device.type == "cuda")


class CompileProblem(NamedTuple):
    """Why torch.compile does not work, and what to do; the latter is empty where it is not known."""

    reason: str
    advice: str

    def __str__(self) -> str:
        return ": ".join(filter(None, self))


def compile_problem(device: torch.device, *, afresh: bool = False) -> CompileProblem | None:
    """Why torch.compile does not work here; None when it does. Compiled code is kept in private folders from then on.

    `afresh`: whatever was compiled before.
    """
    keep_compiled_code_private()
    folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with new_compile_caches(folder) if afresh else nullcontext():
            torch.compile(lambda values: values * 2 + 1, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:  # dynamo, inductor and compilers raise anything
        return CompileProblem(f"{type(error).__name__}: {' '.join(str(error).split())[:160]}", _advice(folder))
    return None


def _advice(folder: Path) -> str:
    """By what this machine has."""
    if folder.exists() and os.statvfs(folder).f_flag & os.ST_NOEXEC:
        return f"no program in {folder} may be run (its mount has noexec): set {CACHE_ENV} to another folder"
    compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    if not any(map(shutil.which, compilers)):
        return "install a C++ compiler (Debian and Ubuntu: g++)"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "install Python's headers (Debian and Ubuntu: python3-dev)"
    return ""
