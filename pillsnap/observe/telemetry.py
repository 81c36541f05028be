"""What the machine is doing: GPUs by NVML, host memory, processor and disk."""

from __future__ import annotations

import functools
import socket
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any


def sample(path: Path | None = None) -> dict[str, Any]:
    """One reading of this machine; `gpus` is empty where NVML finds none, `disk_*` is of the file system of `path`.

    `node` is the machine's name. Bytes, degrees Celsius, watts; `utilization` and `cpu_fraction` are 0 to 1. A figure
    that a GPU does not give is None. `cpu_fraction` is the mean since the last call in this process (0 at the first).
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
    """NVML, initialised; None on a machine without an NVIDIA driver."""
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

    def ask(function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except nvml.NVMLError:  # not supported by this GPU, or not permitted
            return None

    gpus = []
    for index in range(ask(nvml.nvmlDeviceGetCount) or 0):
        handle = ask(nvml.nvmlDeviceGetHandleByIndex, index)
        if handle is None:
            continue
        memory = ask(nvml.nvmlDeviceGetMemoryInfo, handle)
        rates = ask(nvml.nvmlDeviceGetUtilizationRates, handle)
        power_mw = ask(nvml.nvmlDeviceGetPowerUsage, handle)
        limit_mw = ask(nvml.nvmlDeviceGetEnforcedPowerLimit, handle)
        gpus.append(
            {
                "index": index,
                "name": ask(nvml.nvmlDeviceGetName, handle),
                "memory_used_bytes": memory and memory.used,
                "memory_total_bytes": memory and memory.total,
                "utilization": rates and rates.gpu / 100,
                "temperature_c": ask(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
                "power_w": power_mw and power_mw / 1000,
                "power_limit_w": limit_mw and limit_mw / 1000,
            }
        )
    return gpus
