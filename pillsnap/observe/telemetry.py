"""Load of this machine: GPUs (NVML), memory, CPU and disk."""

from __future__ import annotations

import functools
import socket
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any


def sample(path: Path | None = None) -> dict[str, Any]:
    """One sample of this machine; `gpus` is empty without NVML, `disk_*` describes the file system of `path`.

    `node` is the host name. Bytes, degrees Celsius, watts; `utilization` and `cpu_fraction` are 0 to 1. Values that a
    GPU does not report are None. `cpu_fraction` is the mean since the last call in this process (0 at the first).
    """
    import psutil

    memory = psutil.virtual_memory()
    disk = psutil.disk_usage(str(path or Path.cwd()))
    return {
        "node": socket.gethostname(),
        "gpus": _gpus(),
        "cpu_fraction": psutil.cpu_percent() / 100,
        "host_memory_used_bytes": memory.total - memory.available,
        "host_memory_total_bytes": memory.total,
        "disk_free_bytes": disk.free,
        "disk_total_bytes": disk.total,
    }


@functools.cache
def _nvml() -> ModuleType | None:
    """NVML, initialized; None without an NVIDIA driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


def _gpus() -> list[dict[str, Any]]:
    nvml = _nvml()
    if nvml is None:
        return []

    def query(function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except nvml.NVMLError:  # unsupported by this GPU, or not permitted
            return None

    gpus = []
    for index in range(query(nvml.nvmlDeviceGetCount) or 0):
        handle = query(nvml.nvmlDeviceGetHandleByIndex, index)
        if handle is None:
            continue
        memory = query(nvml.nvmlDeviceGetMemoryInfo, handle)
        rates = query(nvml.nvmlDeviceGetUtilizationRates, handle)
        power_mw = query(nvml.nvmlDeviceGetPowerUsage, handle)
        limit_mw = query(nvml.nvmlDeviceGetEnforcedPowerLimit, handle)
        gpus.append(
            {
                "index": index,
                "name": query(nvml.nvmlDeviceGetName, handle),
                "memory_used_bytes": memory and memory.used,
                "memory_total_bytes": memory and memory.total,
                "utilization": rates and rates.gpu / 100,
                "temperature_c": query(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
                "power_w": power_mw and power_mw / 1000,
                "power_limit_w": limit_mw and limit_mw / 1000,
            }
        )
    return gpus
