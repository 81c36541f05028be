"""Folders of this user for what may be deleted at any time: copies of remote files, weights, compiled code."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pillsnap.errors import UserError

CACHE_ENV = "PILLSNAP_CACHE_DIR"
_COMPILED = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}


def cache_folder() -> Path:
    """Local folder for copies of remote files: PILLSNAP_CACHE_DIR, or a folder of this user in the temporary folder.

    Raises UserError when the latter is not this user's alone.
    """
    if os.environ.get(CACHE_ENV):
        return Path(os.environ[CACHE_ENV]).absolute()
    folder = Path(tempfile.gettempdir(), f"pillsnap-{os.getuid()}")
    _make(folder)
    return folder


def private_folder(name: str) -> Path:
    """Folder `name` in the cache folder, for files that are trusted or executed when they are read again.

    Raises UserError when another user can write to it.
    """
    root = cache_folder()
    root.mkdir(parents=True, exist_ok=True)
    status = root.stat()
    if status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
        raise UserError(f"Every user can replace the folders in {root}: set {CACHE_ENV} to another folder.")
    _make(root / name)
    return root / name


def keep_compiled_code_private() -> None:
    """Point torch.compile and Triton, which execute what they find in their caches, to private folders.

    Their defaults are in the shared temporary folder and in the home folder. Variables that the user set stay.
    """
    for variable, name in _COMPILED.items():
        if variable not in os.environ:
            os.environ[variable] = str(private_folder(name))


@contextmanager
def new_compile_caches(folder: Path) -> Iterator[None]:
    """Compile with empty caches in `folder`, and discard what is compiled."""
    before = {name: os.environ.get(name) for name in _COMPILED}
    with tempfile.TemporaryDirectory(prefix="trial-", dir=folder) as trial:
        os.environ.update({variable: os.path.join(trial, name) for variable, name in _COMPILED.items()})
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value


def require_private(path: Path, status: os.stat_result, advice: str) -> None:
    """Raise UserError unless only this user can write to `path`, whose lstat is `status`."""
    if stat.S_ISLNK(status.st_mode) or status.st_uid != os.getuid():
        raise UserError(f"{path} belongs to another user: {advice}.")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UserError(f"Other users can write to {path}: {advice}.")


def _make(folder: Path) -> None:
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700, parents=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise UserError(f"{folder} is not a folder of yours: set {CACHE_ENV} to another folder for copies.")
    require_private(folder, status, f"delete it, or set {CACHE_ENV} to another folder for copies")
