"""Evaluates stage 3: `python -m tests.performance.stage_3_evaluator` is `pillsnap evaluate --run artifacts/stage3`.

Options are those of `pillsnap evaluate`; without --run the run directory is artifacts/stage3. Exit code 0 when the
targets are met, 1 when one is missed or a checkpoint is missing or damaged, 2 when there is no such run.
"""

from __future__ import annotations

import sys

from pillsnap.cli.main import app

DEFAULT_RUN = ["--run", "artifacts/stage3"]


def main(options: list[str]) -> None:
    """Call `pillsnap evaluate`; exits with its code."""
    named = any(option.split("=")[0] in ("--run", "--help") for option in options)
    app(["evaluate", *([] if named else DEFAULT_RUN), *options])


if __name__ == "__main__":
    main(sys.argv[1:])
