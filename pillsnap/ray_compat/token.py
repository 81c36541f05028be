"""Ray's token file, readable by its owner alone: Ray itself creates it readable by every user of the machine."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

from pillsnap.caches import private_folder
from pillsnap.errors import UserError

_PATH = "RAY_AUTH_TOKEN_PATH"
_IN_HOME = Path(".ray/auth_token")


def token_variables() -> dict[str, str]:
    """Variables of the environment by which Ray finds its token; the file is made when there is none, in the home
    folder or, where that cannot be written to, in the private cache folder.

    Nothing is done when the user passes a token (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH) or turns authentication off.
    Raises UserError when the file belongs to another user.
    """
    if not _is_used() or os.environ.get(_PATH):
        return {}
    try:
        _make(_in_home())
    except OSError:
        path = private_folder("ray") / _IN_HOME.name
        _make(path)
        return {_PATH: str(path)}
    return {}


def check_token() -> None:
    """Raise UserError or OSError when the token file is empty, cannot be read, or is named and not there."""
    if not _is_used():
        return
    named = os.environ.get(_PATH)
    path = Path(named) if named else _in_home()
    if os.path.exists(path):
        if not path.read_bytes().strip():
            raise UserError(f"Ray's token file {path} is empty: delete it, so that Ray makes another.")
    elif named:
        raise UserError(f"Ray's token {path} is not there and cannot be made: unset {_PATH}, or set RAY_AUTH_TOKEN.")


def _is_used() -> bool:
    return os.environ.get("RAY_AUTH_MODE", "token").lower() == "token" and not os.environ.get("RAY_AUTH_TOKEN")


def _in_home() -> Path:
    home = os.path.expanduser("~")  # Path.home() raises for a user without a home folder
    return Path(home if os.path.isabs(home) else os.devnull, _IN_HOME)


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
