"""Recognize the pills on photos as a Ray job; options are those of `pillsnap predict`."""

from __future__ import annotations

import sys

from pillsnap.cli.main import app

if __name__ == "__main__":
    app(["predict", *sys.argv[1:]])
