"""What can be known before a run starts: GPU, packages, manifest, disk."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path

from pillsnap.checklist import Check
from pillsnap.config import Settings
from pillsnap.data.archives import with_locations
from pillsnap.data.manifest import read_classes, read_manifest
from pillsnap.data.photos import PhotoStore
from pillsnap.errors import UserError
from pillsnap.observe.telemetry import sample

MAX_GPU_MEMORY_USED = 0.20
MIN_DISK_BYTES = 10 * 10**9
_PHOTOS_TRIED = 20


def preflight(settings: Settings, run_dir: Path, manifest_path: Path, data_root: str) -> list[Check]:
    """Every check that needs no training; reads only."""
    return [
        *gpu_checks(),
        _packages_check(),
        *_manifest_checks(settings, manifest_path, data_root),
        disk_check(run_dir),
    ]


def gpu_checks() -> list[Check]:
    """Is there a GPU that torch can use, and is its memory free?"""
    import torch

    gpus = sample()["gpus"]
    if not torch.cuda.is_available():
        if gpus:
            advice = "install the torch build that fits the driver, and look at CUDA_VISIBLE_DEVICES"
            return [Check("GPU", False, f"NVML sees {len(gpus)}, torch {torch.__version__} sees none", advice)]
        return [
            Check("GPU", None, "none: training runs on the CPU", "a stage takes days so; the demo does not need one")
        ]
    names = Counter(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    checks = [Check("GPU", True, ", ".join(f"{count} x {name}" for name, count in names.items()))]
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        used = 1 - free / total
        found = f"{used:.0%} of {total / 2**30:.1f} GiB used"
        advice = f"end what else uses it: more than {MAX_GPU_MEMORY_USED:.0%} is taken"
        checks.append(Check(f"GPU {index} memory", used < MAX_GPU_MEMORY_USED, found, advice))
    return checks


def _packages_check() -> Check:
    import importlib

    missing = []
    for name in (
        "ray.data",
        "ray.train",
        "torch",
        "torchvision",
        "ultralytics.nn.tasks",
        "timm",
        "kornia_rs",
        "cv2",
        "wandb",
    ):
        if name.startswith("ultralytics"):
            importlib.import_module("pillsnap.models.detector")
        try:
            importlib.import_module(name)
        except Exception as error:  # a broken binary package raises whatever its loader raises
            missing.append(f"{name} ({' '.join(str(error).split())[:80]})")
    if missing:
        return Check("packages", False, f"cannot be imported: {'; '.join(missing)}", "run `make install` again")
    return Check("packages", True, "ray, torch, torchvision, ultralytics, timm, kornia-rs, OpenCV and wandb import")


def _manifest_checks(settings: Settings, manifest_path: Path, data_root: str) -> list[Check]:
    try:
        manifest = read_manifest(manifest_path)
        classes = read_classes(manifest_path if manifest_path.is_dir() else manifest_path.parent)
    except UserError as error:
        return [Check("manifest", False, str(error), "build it with `pillsnap manifest build`")]
    splits = Counter(manifest["split"].to_pylist())
    found = f"{splits['train']:,} train and {splits['val']:,} val photos, {len(classes):,} classes"
    asked = settings.sampling.num_photos
    short = asked is not None and len(manifest) < asked
    checks = [
        Check("manifest", None if short else True, found, f"the preset asks for {asked:,} photos" if short else "")
    ]
    if not splits["train"] or not splits["val"]:
        checks[0] = Check("manifest", False, found, "both splits need photos")
    step = max(1, len(manifest) // _PHOTOS_TRIED)
    paths = with_locations(manifest)["image_path"].to_pylist()[::step][:_PHOTOS_TRIED]
    lacking = [path for path in paths if not _readable(PhotoStore(data_root), path)]
    first = f", the first {lacking[0]}" if lacking else ""
    advice = "look at --data-root, and run `pillsnap manifest validate`"
    checks.append(
        Check("photos", not lacking, f"{len(paths) - len(lacking)} of {len(paths)} tried can be read{first}", advice)
    )
    return checks


def _readable(store: PhotoStore, path: str) -> bool:
    try:
        return bool(store.read(path))
    except (OSError, UserError):
        return False


def disk_check(run_dir: Path) -> Check:
    """Is there room for a run?"""
    folder = run_dir
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    writable = os.access(folder, os.W_OK)
    advice = f"free space or name another --run: {MIN_DISK_BYTES / 1e9:.0f} GB are needed"
    found = f"{free / 1e9:.1f} GB free at {folder}" + ("" if writable else ", which cannot be written to")
    return Check("disk", free > MIN_DISK_BYTES and writable, found, advice)
