"""Keeps variables that are meant for other programs from this command and from every process that it starts."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

_FOREIGN = (
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE",
    "MASTER_ADDR", "MASTER_PORT",
    "MPLBACKEND",
    "RAY_TRAIN_V2_ENABLED",
    "OPENCV_IO_MAX_IMAGE_PIXELS", "OPENCV_IO_MAX_IMAGE_WIDTH", "OPENCV_IO_MAX_IMAGE_HEIGHT",
    "PYTHONOPTIMIZE", "PYTHONWARNINGS", "PYTHONINSPECT", "PYTHONSTARTUP", "PYTHONDEVMODE", "PYTHONVERBOSE",
    "PYTHONPROFILEIMPORTTIME", "PYTHONTRACEMALLOC", "PYTHONDUMPREFS", "PYTHONDEBUG", "PYTHONIOENCODING", "PYTHONMALLOC",
    "PYTHONASYNCIODEBUG",
)  # fmt: skip
"""Of a launcher whose process this is not; of a notebook; of programs for the former Ray Train; of programs that read a
stranger's images, for which `data.max_pixels` is the limit here; of an interpreter that is debugged. Ray does not start
without docstrings, or where a warning is an error."""
_AT_THE_START = (b"PYTHONOPTIMIZE", b"PYTHONWARNINGS", b"PYTHONDEVMODE")
_CACHES = ("MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "YOLO_CONFIG_DIR")
"""Folders that libraries make when they are imported, which fails where one cannot be made."""
_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""Network interfaces over which workers speak; a profile for other machines names some that are not here. Workers on
one machine find one without."""
_FOREIGN_PREFIXES = ("TORCHELASTIC_",)
NARROWEST = 20
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def require_plain_python() -> None:
    """Start this command again in Python's UTF-8 mode where the locale has another encoding: a path or a photo's name
    in UTF-8 would not be found. Output keeps the encoding of the locale. And without variables by which this
    interpreter has dropped docstrings or made errors of warnings.
    """
    environment = {name: value for name, value in os.environb.items() if name not in _AT_THE_START}
    if sys.getfilesystemencoding() != "utf-8":
        encoding = getattr(sys.stdout, "encoding", "utf-8").encode()
        environment |= {b"PYTHONUTF8": b"1", b"PYTHONIOENCODING": encoding}
    if environment != os.environb:
        words = Path("/proc/self/cmdline").read_bytes().split(b"\0")[:-1]  # sys.argv has lost what it cannot decode
        os.execve(sys.executable, words, environment)


def clean_environment() -> None:
    """Remove variables of launchers, notebooks and interpreters, and a width in which nothing can be printed; keep this
    machine's addresses from proxies, and the working directory off the import path of children.
    """
    for name in [*os.environ]:
        if name in _FOREIGN or name.startswith(_FOREIGN_PREFIXES) or (name in _CACHES and not _can_be_made(name)):
            del os.environ[name]
    if not os.environ.get("COLUMNS", "80").isdigit() or int(os.environ.get("COLUMNS", "80")) < NARROWEST:
        del os.environ["COLUMNS"]
    if any(name.lower().endswith("_proxy") for name in os.environ):
        known = os.environ.get("no_proxy", os.environ.get("NO_PROXY", "")).split(",")
        spared = ",".join(dict.fromkeys([part for part in known if part] + [*_LOOPBACK]))
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = spared
    if not os.environ.get("RAY_ADDRESS"):
        # All of Ray's processes run on this machine, in this Python. By itself Ray would follow `uv run`: pack the
        # working directory, photos and all, and make an environment for each of its processes.
        os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
        os.environ.pop("RAY_RUNTIME_ENV_HOOK", None)
        for name in _INTERFACES:
            if name in os.environ and not _has_interfaces(os.environ[name]):
                del os.environ[name]
    os.environ.setdefault("PYTHONSAFEPATH", "1")  # `python -m` would import from it, and it may be somebody else's


def _can_be_made(name: str) -> bool:
    """Whether the folder that a variable names is there, or can be made, and can be written to."""
    try:
        os.makedirs(os.environ[name], exist_ok=True)
    except OSError:
        return False
    return os.access(os.environ[name], os.W_OK | os.X_OK)


def _has_interfaces(value: str) -> bool:
    """Whether every interface of a list has an address on this machine."""
    import psutil

    addresses = psutil.net_if_addrs()
    return all(
        any(each.family in (socket.AF_INET, socket.AF_INET6) for each in addresses.get(name, []))
        for name in value.split(",")
    )
