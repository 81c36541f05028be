"""SIGKILL of every observer process during training does not change its losses."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from benchmarks.watchers.training import StepLog, Training
from benchmarks.watching import Watchers
from pillsnap.observe.events import read_events
from tests.unit.tracking.conftest import WandbServer

STEPS_BEFORE, STEPS_AFTER = 20, 30


@pytest.mark.reliability
def test_killed_observers_do_not_change_the_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    server = WandbServer()
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    for name in [name for name in os.environ if name in ("WANDB_MODE",)]:
        monkeypatch.delenv(name)
    warnings: list[str] = []
    watched = Training(tmp_path, "watched", num_threads=1)
    request.addfinalizer(watched.process.kill)
    log = StepLog(watched.run_dir)
    log.wait_for_step(STEPS_BEFORE, watched)
    watchers = Watchers(watched.run_dir, psutil.Process(watched.process.pid), warnings, server)
    request.addfinalizer(watchers.kill)
    watchers.window(True, 5.0)
    before = log.poll()
    assert watchers.max_server_rss_bytes < 200e6
    watchers.kill()
    log.wait_for_step(before + STEPS_AFTER, watched)
    watched.stop()
    server.server.shutdown()

    alone = Training(tmp_path, "alone", num_threads=1)
    request.addfinalizer(alone.process.kill)
    StepLog(alone.run_dir).wait_for_step(before + STEPS_AFTER, alone)
    alone.stop()
    events = [read_events(run.run_dir) for run in (watched, alone)]
    losses = [{event["step"]: event["loss"] for event in found if event["kind"] == "step"} for found in events]
    compared = [step for step in losses[0] if step <= before + STEPS_AFTER]
    assert len(compared) >= 5
    assert [losses[0][step] for step in compared] == [losses[1][step] for step in compared]
    told = [event for found in events for event in found if event["kind"] in ("warning", "failure")]
    assert not [event for event in told if not event.get("message", "").startswith("disk: ")]  # of this machine
