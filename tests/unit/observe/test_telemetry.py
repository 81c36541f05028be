"""Telemetry samples the machine, with and without GPUs."""

from __future__ import annotations

import shutil
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from pillsnap.observe import telemetry


class FakeError(Exception):
    pass


def fake_nvml(**answers: object) -> types.SimpleNamespace:
    def answer(name: str) -> object:
        def function(*_: object) -> object:
            value = answers[name]
            if value is FakeError:
                raise FakeError
            return value

        return function

    return types.SimpleNamespace(
        NVMLError=FakeError, NVML_TEMPERATURE_GPU=0, **{f"nvmlDeviceGet{name}": answer(name) for name in answers}
    )


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    telemetry._nvml.cache_clear()
    yield
    telemetry._nvml.cache_clear()


def test_host_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "_nvml", lambda: None)
    values = telemetry.sample(tmp_path)
    assert values["gpus"] == []
    assert 0 < values["host_memory_used_bytes"] < values["host_memory_total_bytes"]
    assert values["disk_total_bytes"] == shutil.disk_usage(tmp_path).total
    assert abs(values["disk_free_bytes"] - shutil.disk_usage(tmp_path).free) < 1 << 30
    assert 0 <= values["cpu_fraction"] <= 1


def test_gpu_with_an_unsupported_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = fake_nvml(
        Count=1,
        HandleByIndex=object(),
        Name="NVIDIA GeForce RTX 5080",
        MemoryInfo=types.SimpleNamespace(used=4 << 30, total=16 << 30),
        UtilizationRates=types.SimpleNamespace(gpu=97),
        Temperature=61,
        PowerUsage=301_500,
        EnforcedPowerLimit=FakeError,
    )
    monkeypatch.setattr(telemetry, "_nvml", lambda: nvml)
    assert telemetry.sample(tmp_path)["gpus"] == [
        {
            "index": 0,
            "name": "NVIDIA GeForce RTX 5080",
            "memory_used_bytes": 4 << 30,
            "memory_total_bytes": 16 << 30,
            "utilization": 0.97,
            "temperature_c": 61,
            "power_w": 301.5,
            "power_limit_w": None,
        }
    ]


@pytest.mark.gpu
def test_real_gpu() -> None:
    gpus = telemetry.sample()["gpus"]
    assert len(gpus) >= 1 and gpus[0]["memory_total_bytes"] > 1 << 30 and 0 < gpus[0]["temperature_c"] < 110
