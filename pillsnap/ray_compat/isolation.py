"""Keeps a local cluster's ports on loopback, and the working directory off the import path of workers."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pillsnap.caches import private_folder
from pillsnap.processes import added_variables
from pillsnap.ray_compat import capabilities
from pillsnap.ray_compat.patches import replaced

_LOOPBACK = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray's switch for one machine: its node has the address 127.0.0.1
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
}


@contextmanager
def on_loopback() -> Iterator[None]:
    """Give a cluster started within the address 127.0.0.1, so that Ray binds its ports to it.

    Without the adapter this holds only if Ray, which reads its switch at import, is imported within.
    """
    works = capabilities.loopback()  # imports Ray before the switch is set: the process may join a cluster later
    with added_variables(_LOOPBACK), contextlib.ExitStack() as stack:
        if works:
            from ray._private import ray_constants

            stack.enter_context(replaced((ray_constants, "ENABLE_RAY_CLUSTER", False)))
        yield


@contextmanager
def own_import_path() -> Iterator[dict[str, Any]]:
    """Options for a `ray.init` within. Ray lets workers import from the driver's working directory first, where a run
    of somebody else may hold modules; with these options they do so only if this process does.
    """
    if os.getcwd() in map(os.path.abspath, sys.path):
        yield {}
    elif capabilities.import_path():
        from ray.job_config import JobConfig

        yield {"job_config": JobConfig(_client_job=True)}  # its only other effect: local packages are not uploaded
    else:
        with contextlib.chdir(private_folder("ray")):
            yield {}
