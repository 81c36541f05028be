"""Check every node of a cluster before stage 3 as a Ray job; further options are those of `pillsnap preflight`."""

from __future__ import annotations

import sys

from pillsnap.cli.main import app

if __name__ == "__main__":
    app(["preflight", "--stage", "3", *sys.argv[1:]])
