"""Build a manifest as a Ray job; options are those of `pillsnap manifest build`."""

from __future__ import annotations

import sys

from pillsnap.cli.main import app

if __name__ == "__main__":
    app(["manifest", "build", *sys.argv[1:]])
