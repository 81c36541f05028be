"""Ray's token file, readable by its owner alone: Ray itself creates it readable by every user of the machine."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

from pillsnap.caches import private_folder
from pillsnap.errors import UserError

_PATH = "RAY_AUTH_TOKEN_PATH"


def token_variables() -> dict[str, str]:
    """Variables of the environment by which Ray finds its token; the file is made when there is none.

    Nothing is done when the user passes a token (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH) or turns authentication off.
    Raises UserError when the file belongs to another user.
    """
    mode = os.environ.get("RAY_AUTH_MODE", "token").lower()
    if mode != "token" or os.environ.get("RAY_AUTH_TOKEN") or os.environ.get(_PATH):
        return {}
    path = Path.home() / ".ray" / "auth_token"
    try:
        _make(path)
    except OSError:  # a home folder that is missing, or cannot be written to
        path = private_folder("ray") / "auth_token"
        _make(path)
        return {_PATH: str(path)}
    return {}


def _make(path: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with suppress(FileExistsError):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
    status = path.stat()
    if status.st_uid != os.getuid():
        raise UserError(f"Ray's token file {path} belongs to another user: delete it, or set {_PATH} to one of yours.")
    if status.st_mode & 0o077:
        path.chmod(0o600)
