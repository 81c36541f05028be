"""Rates of the training loop, and what an image costs in the loader."""

from __future__ import annotations

from typing import Any

import pytest

from pillsnap.data.loader import DeviceBatch
from pillsnap.train import meters
from pillsnap.train.meters import Throughput


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(meters.time, "perf_counter", lambda: now[0])
    return now


def batch(num_valid: int, wait_s: float, **stage_s: float) -> DeviceBatch:
    empty: Any = None
    return DeviceBatch(0, True, 0, empty, {}, empty, num_valid, wait_s=wait_s, stage_s=stage_s)


def test_rates_waiting_and_loader_stages(clock: list[float]) -> None:
    meter = Throughput(images_left=1000)
    for _ in range(4):
        clock[0] += 0.5
        meter.step(20, batch(10, 0.1, read=0.01, decode=0.2, warp=0.05, hand_over=0.001))
    assert meter.figures() == pytest.approx({"images_per_s": 40.0, "data_wait_fraction": 0.2, "eta_s": 23.0})
    epoch = meter.epoch_figures()
    # Two workers make a step of twenty; this one sees ten of them, and times those.
    assert epoch.pop("loader_ms") == pytest.approx({"read": 1.0, "decode": 20.0, "warp": 5.0, "hand_over": 0.1})
    assert epoch == pytest.approx({"images_per_s": 40.0, "data_wait_fraction": 0.2, "duration_s": 2.0})


def test_an_epoch_begins_anew(clock: list[float]) -> None:
    meter = Throughput(images_left=100)
    clock[0] += 1
    meter.step(10, batch(10, 1.0, read=1.0))
    meter.epoch_figures()
    clock[0] += 2
    meter.step(10, batch(10, 0.0, read=0.02))
    figures = meter.epoch_figures()
    assert (figures["images_per_s"], figures["data_wait_fraction"]) == (5.0, 0.0)
    assert figures["loader_ms"] == pytest.approx({"read": 2.0})
