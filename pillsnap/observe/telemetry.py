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


def named_gpu(uuid: str) -> dict[str, Any] | None:
    """The GPU or MIG slice with this UUID, or the only one whose UUID starts so, as CUDA_VISIBLE_DEVICES names it.

    A slice has the memory of its own, and the `index` "<GPU> slice <number>". None when NVML knows no such device.
    """
    nvml = _nvml()
    if nvml is None:
        return None
    found: list[tuple[str | int, Any]] = []
    for index, gpu in _handles(nvml):
        gpu_uuid = _query(nvml.nvmlDeviceGetUUID, gpu) or ""
        if gpu_uuid.lower().startswith(uuid.lower()):
            found.append((index, gpu))
        for number in range(_query(nvml.nvmlDeviceGetMaxMigDeviceCount, gpu) or 0):
            part = _query(nvml.nvmlDeviceGetMigDeviceHandleByIndex, gpu, number)
            if part is None:
                continue
            instances = (nvml.nvmlDeviceGetGpuInstanceId, nvml.nvmlDeviceGetComputeInstanceId)
            names = {
                _query(nvml.nvmlDeviceGetUUID, part) or "",
                f"MIG-{gpu_uuid}/" + "/".join(str(_query(each, part)) for each in instances),  # of older drivers
            }
            if any(name.lower().startswith(uuid.lower()) for name in names):
                found.append((f"{index} slice {number}", part))
    if len(found) != 1:
        return None
    ((where, device),) = found
    memory = _query(nvml.nvmlDeviceGetMemoryInfo, device)
    return {
        "index": where,
        "memory_used_bytes": memory and memory.used,
        "memory_total_bytes": memory and memory.total,
    }


def _query(function: Callable[..., Any], *arguments: Any) -> Any:
    nvml = _nvml()
    assert nvml is not None
    try:
        return function(*arguments)
    except nvml.NVMLError:  # unsupported by this GPU, or not permitted
        return None


def _handles(nvml: ModuleType) -> list[tuple[int, Any]]:
    handles = [(i, _query(nvml.nvmlDeviceGetHandleByIndex, i)) for i in range(_query(nvml.nvmlDeviceGetCount) or 0)]
    return [(index, handle) for index, handle in handles if handle is not None]


def _gpus() -> list[dict[str, Any]]:
    nvml = _nvml()
    if nvml is None:
        return []
    gpus = []
    for index, handle in _handles(nvml):
        memory = _query(nvml.nvmlDeviceGetMemoryInfo, handle)
        rates = _query(nvml.nvmlDeviceGetUtilizationRates, handle)
        power_mw = _query(nvml.nvmlDeviceGetPowerUsage, handle)
        limit_mw = _query(nvml.nvmlDeviceGetEnforcedPowerLimit, handle)
        gpus.append(
            {
                "index": index,
                "name": _query(nvml.nvmlDeviceGetName, handle),
                "memory_used_bytes": memory and memory.used,
                "memory_total_bytes": memory and memory.total,
                "utilization": rates and rates.gpu / 100,
                "temperature_c": _query(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
                "power_w": power_mw and power_mw / 1000,
                "power_limit_w": limit_mw and limit_mw / 1000,
            }
        )
    return gpus
