"""`python -m tests.performance.stage_3_evaluator` is `pillsnap evaluate` for stage 3."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODULE = [sys.executable, "-m", "tests.performance.stage_3_evaluator"]


def test_it_calls_evaluate(tmp_path: Path) -> None:
    helped = subprocess.run([*MODULE, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert helped.returncode == 0 and "Evaluate a trained run on its validation photos" in helped.stdout
    missing = subprocess.run([*MODULE, "--run", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert missing.returncode == 2
    assert missing.stderr.strip().endswith("Train it first, or name another with --run.")
    assert (
        "artifacts/stage3 is not a run"
        in subprocess.run(MODULE, cwd=ROOT, capture_output=True, text=True, timeout=120).stderr
    )
