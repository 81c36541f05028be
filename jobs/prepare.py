"""Fill the decode-once store of stage 3 as a Ray job; further options are those of `pillsnap prepare`."""

from __future__ import annotations

import sys

from pillsnap.cli.main import app

if __name__ == "__main__":
    app(["prepare", "--stage", "3", *sys.argv[1:]])
