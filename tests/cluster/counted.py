"""Runs a job script whose workers record the samples of every step: python -m tests.cluster.counted SCRIPT …

Recording is enabled by a faults.json (tests/reliability/harness.py).
"""

from __future__ import annotations

import runpy
import sys

if __name__ == "__main__":
    from pillsnap.train import trainer
    from tests.reliability.harness import worker_with_faults

    trainer.run_worker = worker_with_faults
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
