"""`pillsnap train` at toy size in a separate process: python -m tests.reliability.driver RUN MANIFEST ROOT JSON [N]

JSON overrides settings. Exit codes are the command's: 0, 2 with the error, 130 when stopped. With N, it trains and
evaluates N runs in RUN/0, RUN/1, … in sequence, and prints the leftovers after each.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import tests.conftest  # noqa: F401  (sets the environment of the tests first)


def main(run_dir: Path, manifest: Path, root: Path, overrides: dict) -> int:
    from rich.console import Console

    from pillsnap.errors import UserError
    from pillsnap.observe.logs import setup_logging
    from pillsnap.runs.directory import open_run
    from pillsnap.train import trainer
    from pillsnap.train.driver import RunStopped, train_and_evaluate
    from tests.reliability.harness import tiny, worker_with_faults

    trainer.run_worker = worker_with_faults
    try:
        run, _ = open_run(run_dir, tiny(**overrides), manifest, root)
        setup_logging(run_dir)
        train_and_evaluate(run, Console(quiet=True))
    except RunStopped:
        return 130
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def left_over() -> dict:
    """Remaining processes, shared memory and temporary folders, and this process's resident memory."""
    import gc

    import psutil

    from tests.processes import command_line, descendants

    gc.collect()
    own = psutil.Process()
    give_up_s = time.monotonic() + 10
    while descendants() and time.monotonic() < give_up_s:
        time.sleep(0.1)
    return {
        "rss": own.memory_info().rss,
        "processes": [" ".join(command_line(child))[:80] for child in descendants()],
        "shared_memory": sorted(os.listdir("/dev/shm")),
        "temporary": sorted(str(path) for path in Path(tempfile.gettempdir()).iterdir()),
        "sessions": sorted(path.name for path in Path(tempfile.gettempdir(), "ray").glob("session_2*")),
    }


if __name__ == "__main__":
    where, manifest, root = (Path(argument) for argument in sys.argv[1:4])
    overrides = json.loads(sys.argv[4])
    if len(sys.argv) == 5:
        sys.exit(main(where, manifest, root, overrides))
    for number in range(int(sys.argv[5])):
        assert main(where / str(number), manifest, root, overrides) == 0
        print(json.dumps(left_over()), flush=True)
