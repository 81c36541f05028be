"""What can be known before a run: GPU, its memory, packages, manifests with their counts, photos, disk."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._inductor.config

from pillsnap.checklist import Check, all_passed
from pillsnap.cluster import preflight as module
from pillsnap.cluster.preflight import preflight
from pillsnap.config import load_settings
from pillsnap.manifest.table import read_manifest
from pillsnap.observe import telemetry

GIB = 2**30


def by_name(checks: list[Check]) -> dict[str, Check]:
    assert len({check.name for check in checks}) == len(checks)
    return {check.name: check for check in checks}


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Two GPUs that NVML and torch see and that compute."""
    found = [
        {"index": index, "memory_used_bytes": used * GIB, "memory_total_bytes": 16 * GIB}
        for index, used in enumerate((1, 4))
    ]
    monkeypatch.setattr(module, "sample", lambda: {"gpus": found})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "RTX 5080")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    real = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *size, device: real(*size))
    return found


def test_a_machine_fit_to_train(
    toy_manifest: Path, toy_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MIN_DISK_BYTES", 0)  # of the test's own machine
    checks = by_name(preflight(load_settings("demo"), tmp_path / "run", toy_manifest, str(toy_tree)))
    assert all_passed(list(checks.values()))
    splits = read_manifest(toy_manifest)["split"].to_pylist()
    num_train, num_val = splits.count("train"), splits.count("val")
    assert checks["manifest"].found == f"{num_train} train and {num_val} val photos, 4 classes"
    assert checks["manifest CSV"].ok is True
    assert checks["manifest CSV"].found == f"manifest_train.csv {num_train}, manifest_val.csv {num_val}"
    assert checks["photos"].found == "20 of 20 tried can be read"
    assert "GB free at" in checks["disk"].found
    assert {"GPU", "packages"} <= set(checks)


def test_gpu_memory_in_use_is_measured_against_a_fifth(
    gpus: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = by_name(module.gpu_checks())
    assert checks["GPU"].found == "2 x RTX 5080"
    assert checks["GPU 0 memory"].ok is True and checks["GPU 0 memory"].found == "6% of 16.0 GiB used"
    assert checks["GPU 1 memory"].ok is False and "more than 20% is taken" in checks["GPU 1 memory"].advice
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert set(by_name(module.gpu_checks())) == {"GPU", "GPU 0 memory"}


@pytest.mark.parametrize(
    ("visible", "judged"),
    [("GPU-bbbb2222-0000", ["GPU 1 memory"]), ("GPU-B", ["GPU 1 memory"]),
     ("1, GPU-aa", ["GPU 1 memory", "GPU 0 memory"]),
     ("MIG-cccc3333-0000", ["GPU 1 slice 0 memory"]), ("MIG-GPU-bbbb2222-0000/3/0", ["GPU 1 slice 1 memory"]),
     ("GPU-", []), ("GPU-dddd", []), ("0,-1,1", ["GPU 0 memory"]), ("", [])],
)  # fmt: skip
def test_gpus_are_judged_that_cuda_leaves_visible(
    visible: str, judged: list[str], gpus: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By index, UUID, start of a UUID, and MIG slice; CUDA ignores what follows an unknown name."""
    slices = {"b": ["c", "d"]}
    uuids = {"a": "GPU-aaaa1111-0000", "b": "GPU-bbbb2222-0000", "c": "MIG-cccc3333-0000", "d": "MIG-eeee5555-0000"}
    sizes = {"a": (1, 16), "b": (4, 16), "c": (1, 2), "d": (0, 2)}
    memory = {device: {"used": used * GIB, "total": total * GIB} for device, (used, total) in sizes.items()}

    def slice_of(gpu: str, number: int) -> str:
        if number >= len(slices.get(gpu, [])):
            raise KeyError
        return slices[gpu][number]

    nvml = SimpleNamespace(
        NVMLError=KeyError, nvmlDeviceGetCount=lambda: 2, nvmlDeviceGetHandleByIndex=lambda index: "ab"[index],
        nvmlDeviceGetUUID=uuids.__getitem__, nvmlDeviceGetMaxMigDeviceCount=lambda gpu: {"b": 7}[gpu],
        nvmlDeviceGetMigDeviceHandleByIndex=slice_of, nvmlDeviceGetGpuInstanceId={"c": 2, "d": 3}.__getitem__,
        nvmlDeviceGetComputeInstanceId=lambda device: 0,
        nvmlDeviceGetMemoryInfo=lambda device: SimpleNamespace(**memory[device]),
    )  # fmt: skip
    monkeypatch.setattr(telemetry, "_nvml", lambda: nvml)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    checks = by_name(module.gpu_checks())
    assert list(checks) == ["GPU", *judged]
    if "slice 0" in "".join(judged):
        assert checks["GPU 1 slice 0 memory"].ok is False
        assert checks["GPU 1 slice 0 memory"].found == "50% of 2.0 GiB used"


@pytest.mark.parametrize("compiler", [None, "/nothing/c++"])
def test_compiling_is_tried(compiler: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU, too, where the settings ask for it; a compiled copy from before does not count."""
    monkeypatch.setenv("PILLSNAP_CACHE_DIR", str(tmp_path))
    if compiler:
        monkeypatch.setenv("CXX", compiler)
        monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (compiler,))
    torch._dynamo.reset()
    (check,) = module._compiling_checks(load_settings("demo", {"train.compile": "on", "train.device": "cpu"}))
    if compiler is None:
        assert check.ok is True and check.found == "works on cpu"
    else:
        assert check.ok is False and "\n" not in check.found
        assert "Debian and Ubuntu: g++" in check.advice and "train.compile=off" in check.advice
    assert module._compiling_checks(load_settings("demo", {"train.compile": "off"})) == []
    assert not list(tmp_path.glob("inductor/*"))


def test_a_gpu_that_torch_cannot_compute_on(gpus: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    (check,) = module._computing_checks()
    assert check.ok is True

    def refuse(*size: int, device: str) -> None:
        raise RuntimeError(f"CUDA error: no kernel image is available on {device}\nhint")

    monkeypatch.setattr(torch, "ones", refuse)
    (check,) = module._computing_checks()
    assert check.ok is False
    assert check.found.startswith("GPU 0: CUDA error: no kernel image is available on cuda:0; GPU 1: ")


def test_a_driver_without_a_torch_that_uses_it(gpus: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (check,) = module.gpu_checks()
    assert check.ok is False and check.found.startswith("NVML sees 2, torch")
    assert module._computing_checks() == []


def test_what_lacks_is_said(
    toy_manifest: Path, toy_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load_settings("demo", {"sampling.num_photos": 500})
    manifest = Path(shutil.copytree(toy_manifest.parent, tmp_path / "manifest"))
    (manifest / "manifest_val.csv").unlink()
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=9 * 10**9))
    checks = by_name(preflight(settings, tmp_path / "run", manifest, str(tmp_path)))
    assert not all_passed(list(checks.values()))
    assert checks["manifest"].ok is None and checks["manifest"].advice == "the preset asks for 500 photos"
    assert checks["manifest CSV"].ok is None and "manifest_val.csv is missing" in checks["manifest CSV"].found
    assert checks["photos"].ok is False and checks["photos"].found.startswith("0 of 20 tried can be read, the first ")
    assert checks["disk"].ok is False and checks["disk"].found.startswith("9.0 GB free")
    checks = by_name(preflight(settings, tmp_path / "run", tmp_path / "nothing", str(toy_tree)))
    assert checks["manifest"].ok is False and "build it with" in checks["manifest"].advice


def test_a_package_that_does_not_import(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    real = importlib.import_module

    def broken(name: str) -> Any:
        if name == "kornia_rs":
            raise ImportError("libssl.so.3: cannot open\nshared object file")
        return real(name)

    monkeypatch.setattr(importlib, "import_module", broken)
    check = module._packages_check()
    assert check.ok is False
    assert check.found == "cannot be imported: kornia_rs (libssl.so.3: cannot open shared object file)"
