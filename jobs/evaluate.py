"""Evaluate a run as a Ray job; options are those of `pillsnap evaluate`."""

from __future__ import annotations

import sys

from pillsnap.cli.main import app

if __name__ == "__main__":
    app(["evaluate", *sys.argv[1:]])
