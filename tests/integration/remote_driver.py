"""The `pillsnap` command whose workers have another cache than the driver, as they have on another host.

python -m tests.integration.remote_driver DRIVER_CACHE WORKER_CACHE ARGUMENTS…
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import tests.conftest  # noqa: F401  (the environment of the tests, before anything reads it)

if __name__ == "__main__":
    driver_cache, worker_cache, *arguments = sys.argv[1:]
    os.environ["PILLSNAP_CACHE_DIR"] = worker_cache  # Ray's processes inherit it
    from pillsnap import storage

    storage.cache_folder = lambda: Path(driver_cache)
    from pillsnap.cli.main import app

    app(arguments)
