"""Throughput, data wait and loader time per image; the mean of the epoch's losses."""

from __future__ import annotations

from typing import Any

import pytest

from pillsnap.data.loader import DeviceBatch
from pillsnap.train import meters
from pillsnap.train.meters import RunningMean, Throughput


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(meters.time, "perf_counter", lambda: now[0])
    return now


def batch(num_valid: int, wait_s: float, **stage_s: float) -> DeviceBatch:
    empty: Any = None
    return DeviceBatch(0, True, 0, empty, {}, empty, num_valid, wait_s=wait_s, stage_s=stage_s)


def test_rates_data_wait_and_loader_times(clock: list[float]) -> None:
    meter = Throughput(images_left=1000)
    for _ in range(4):
        clock[0] += 0.5
        meter.step(20, batch(10, 0.1, read=0.01, decode=0.2, warp=0.05, hand_over=0.001))
    assert meter.recent() == pytest.approx({"images_per_s": 40.0, "data_wait_fraction": 0.2, "eta_s": 23.0})
    epoch = meter.epoch()
    # A step of two workers has 20 images; the loader times are those of this worker's 10.
    assert epoch.pop("loader_ms") == pytest.approx({"read": 1.0, "decode": 20.0, "warp": 5.0, "hand_over": 0.1})
    assert epoch == pytest.approx({"images_per_s": 40.0, "data_wait_fraction": 0.2, "duration_s": 2.0})


def test_results_read_at_once_share_a_rate(clock: list[float]) -> None:
    meter = Throughput(images_left=100)
    assert meter.recent()["eta_s"] is None  # nothing is known yet
    clock[0] += 2
    meter.step(20, batch(20, 0.5))
    assert meter.recent() == meter.recent() == {"images_per_s": 10.0, "data_wait_fraction": 0.25, "eta_s": 8.0}


def test_epoch_rates_exclude_earlier_epochs(clock: list[float]) -> None:
    meter = Throughput(images_left=100)
    clock[0] += 1
    meter.step(10, batch(10, 1.0, read=1.0))
    meter.epoch()
    clock[0] += 2
    meter.step(10, batch(10, 0.0, read=0.02))
    rates = meter.epoch()
    assert (rates["images_per_s"], rates["data_wait_fraction"]) == (5.0, 0.0)
    assert rates["loader_ms"] == pytest.approx({"read": 2.0})


def test_running_mean_skips_non_finite_values_and_continues_from_a_checkpoint() -> None:
    first = RunningMean({})
    for value in (1.0, float("nan"), 3.0):
        first.add(value)
    assert first.mean == 2.0
    second = RunningMean(first.progress)
    second.add(8.0)
    assert second.mean == 4.0
    second.clear()
    assert (second.mean, second.progress) == (0.0, {"loss_sum": 0.0, "loss_count": 0})
