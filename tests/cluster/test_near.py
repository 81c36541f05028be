"""Batches are produced on the host of the worker that consumes them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.cluster.hosts import why_not
from tests.cluster.ray_hosts import ROOT, RayHosts
from tests.reliability.harness import say

pytestmark = [pytest.mark.reliability, pytest.mark.skipif(bool(why_not()), reason=why_not())]


def test_batches_are_produced_on_the_host_of_their_worker(tmp_path: Path, toy_manifest: Path, toy_tree: Path) -> None:
    shares = {}
    with RayHosts([tmp_path.parent], workers=2, cpus=2) as cluster:
        environment = cluster.environment() | {"RAY_ADDRESS": f"{cluster.head.ip}:6379"}
        for mode in ("near", "spread"):
            command = (sys.executable, "-m", "tests.cluster.near_driver", str(toy_manifest), str(toy_tree), mode)
            output = cluster.head.run(*command, env=environment, cwd=ROOT)
            (line,) = [line for line in output.splitlines() if line.startswith("FIGURES ")]
            figures = json.loads(line.removeprefix("FIGURES "))
            assert figures["samples"] == figures["expected"]
            shares[mode] = figures["near"]
    say(
        int(shares["near"] >= 0.8 and shares["near"] > shares["spread"] + 0.2), 1,
        f"{shares['near']:.0%} of the batches were produced on their worker's host; default: {shares['spread']:.0%}",
    )  # fmt: skip
