"""How many CPUs and processes decoding takes beside the train workers, and what starting the stream imports."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pillsnap.train.data_config import decoders, decoding_share

ONE, TWO = {"a": 4.0}, {"a": 2.0, "b": 2.0, "head": 0.0}


def test_starting_the_stream_does_not_load_torch() -> None:
    """Ray Train does it in a process of its own at every restart of the workers, which waits for its imports."""
    code = "import sys, pillsnap.train.data_config, pillsnap.runs.backend; print('torch' in sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "False"


@pytest.mark.parametrize(
    ("cpus", "workers", "per_worker", "wanted", "share"),
    [
        (ONE, "aa", 0.5, 1.0, 1.0),
        (ONE, "aaaa", 0.9, 1.0, 0.4),
        (TWO, "ab", 1.5, 1.0, 0.5),
        (TWO, "ab", 1.5, 0.25, 0.25),
        (TWO, "aaa", 0.5, 1.0, 1.0),
        (TWO, "aaaabbbb", 0.5, 1.0, 0.0),
        ({"gpu": 2.0, "cpu": 16.0}, ["gpu", "gpu"], 1.0, 1.0, 1.0),
        ({}, "a", 1.0, 1.0, 0.0),
    ],
)
def test_share(cpus: dict[str, float], workers: list[str], per_worker: float, wanted: float, share: float) -> None:
    assert decoding_share(cpus, workers, per_worker, wanted) == pytest.approx(share, abs=1e-3)


@pytest.mark.parametrize(
    ("cpus", "workers", "per_worker", "share", "number"),
    [
        (ONE, "a", 0.5, 0.75, 4),
        (ONE, "a", 1.0, 1.5, 2),
        (ONE, "a", 1.0, 0.3, 4),
        (ONE, "aaaa", 0.9, 0.4, 1),
        (ONE, "aaaa", 1.0, 0.0, 4),
        (TWO, "a", 0.5, 0.75, 0),
        ({}, "a", 0.5, 0.75, 0),
    ],
)
def test_decoders(cpus: dict[str, float], workers: str, per_worker: float, share: float, number: int) -> None:
    assert decoders(cpus, workers, per_worker, share) == number
