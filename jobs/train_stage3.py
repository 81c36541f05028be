"""Train and evaluate stage 3 as a Ray job; further options are those of `pillsnap train`."""

from __future__ import annotations

import sys

from pillsnap.cli.main import app

if __name__ == "__main__":
    app(["train", "--stage", "3", *sys.argv[1:]])
