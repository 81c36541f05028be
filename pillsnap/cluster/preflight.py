"""What can be known before a run starts: GPU, packages, manifest, disk."""

from __future__ import annotations

import csv
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from pillsnap.checklist import Check
from pillsnap.config import Settings
from pillsnap.errors import UserError
from pillsnap.manifest.audit.quick import reasons_not_to_train
from pillsnap.manifest.table import read_classes, read_manifest
from pillsnap.observe.telemetry import named_gpu, sample
from pillsnap.photos.trial import try_photos

MAX_GPU_MEMORY_USED = 0.20
MIN_DISK_BYTES = 10 * 10**9
INPUT_CHECKS = ("manifest", "labels", "photos")
"""Names of the checks of what the user gives, not of the machines."""


def preflight(settings: Settings, run_dir: Path, manifest_path: Path, data_root: str, uri: str = "") -> list[Check]:
    """Every check that needs no training. On a cluster (RAY_ADDRESS) every node looks, too. `uri` is where the run is
    kept when `run_dir` is only this node's copy.
    """
    return [
        *gpu_checks(),
        *_computing_checks(),
        *_compiling_checks(settings),
        _packages_check(),
        *_manifest_checks(settings, manifest_path, data_root),
        disk_check(run_dir),
        *([_storage_check(uri)] if uri else []),
        *_cluster_checks(settings, uri or str(run_dir), manifest_path, data_root),
    ]


def _storage_check(uri: str) -> Check:
    from pillsnap.cluster.node_checks import storage_problem

    problem = storage_problem(uri)
    return Check("storage", not problem, problem or f"{uri} can be read and written", "look at AWS_* and the bucket")


def _cluster_checks(settings: Settings, run: str, manifest_path: Path, data_root: str) -> list[Check]:
    """What the nodes of the cluster that a run would join see; none without a cluster, or without a manifest."""
    if not os.environ.get("RAY_ADDRESS"):
        return []
    from pillsnap.cluster.node_checks import node_checks
    from pillsnap.cluster.session import ray_session

    try:
        manifest = read_manifest(manifest_path)
    except UserError:  # which the check of the manifest has told
        manifest = None
    with ray_session():
        return node_checks(settings, run, data_root, manifest)


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
    # By NVML: asking CUDA would take half a gigabyte of that memory for as long as this process lives.
    for gpu in _visible(gpus):
        if gpu["memory_used_bytes"] is None or not gpu["memory_total_bytes"]:
            continue
        used = gpu["memory_used_bytes"] / gpu["memory_total_bytes"]
        found = f"{used:.0%} of {gpu['memory_total_bytes'] / 2**30:.1f} GiB used"
        advice = f"end what else uses it: more than {MAX_GPU_MEMORY_USED:.0%} is taken"
        checks.append(Check(f"GPU {gpu['index']} memory", used < MAX_GPU_MEMORY_USED, found, advice))
    return checks


def _visible(gpus: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that CUDA_VISIBLE_DEVICES leaves, by index, UUID or MIG slice; all where it is not set."""
    if "CUDA_VISIBLE_DEVICES" not in os.environ:
        return gpus
    visible: list[dict[str, Any]] = []
    for name in os.environ["CUDA_VISIBLE_DEVICES"].replace(" ", "").split(","):
        by_index = next((gpu for gpu in gpus if str(gpu["index"]) == name), None)
        gpu = named_gpu(name) if name[:4] in ("GPU-", "MIG-") else by_index
        if gpu is None:  # CUDA ignores what follows
            break
        visible.append(gpu)
    return visible


def _computing_checks() -> list[Check]:
    """A small product on each GPU: a torch built for other GPUs sees them and cannot compute on them."""
    import torch

    failures = {}
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        try:
            ones = torch.ones(64, 64, device=f"cuda:{index}")
            if float((ones @ ones).sum()) != 64**3:
                failures[index] = "a product came out wrong"
        except RuntimeError as error:
            failures[index] = str(error).strip().splitlines()[0]
    advice = "install the torch build that fits GPU and driver: https://pytorch.org/get-started/locally"
    if not torch.cuda.is_available():
        return []
    found = "; ".join(f"GPU {index}: {reason}" for index, reason in failures.items())
    return [Check("GPU computes", not failures, found or f"yes, with torch {torch.__version__}", advice)]


def _compiling_checks(settings: Settings) -> list[Check]:
    """Whether torch.compile works, by compiling a small function as for the first time; none where it is not wanted."""
    import torch

    from pillsnap.models.compiling import compile_problem, wants_compiling

    device = torch.device("cuda" if torch.cuda.is_available() and settings.train.device != "cpu" else "cpu")
    if not wants_compiling(settings.train, device):
        return []
    problem = compile_problem(device, afresh=True)
    if problem is None:
        return [Check("compiling", True, f"works on {device.type}")]
    slower = "training is slower without it; --set train.compile=off spares the attempt"
    return [Check("compiling", False, problem.reason, "; ".join(filter(None, (problem.advice, slower))))]


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
        try:
            if name.startswith("ultralytics"):
                importlib.import_module("pillsnap.models.detector").quiet_ultralytics()
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
    else:
        data = settings.data
        reasons = reasons_not_to_train(manifest, data_root, data.max_pixels, data.quarantine_fraction)
        advice = "run `pillsnap manifest validate`, and import or build the manifest again"
        checks.append(
            Check("labels", not reasons, "; ".join(reasons) or "groups and sizes fit the photos tried", advice)
        )
    folder = manifest_path if manifest_path.is_dir() else manifest_path.parent
    checks.append(_csv_check(folder, splits))
    tried, lacking = try_photos(manifest["location"].to_pylist(), data_root)
    first = f", the first {lacking[0]}" if lacking else ""
    advice = "look at --data-root, and run `pillsnap manifest validate`"
    checks.append(Check("photos", not lacking, f"{tried - len(lacking)} of {tried} tried can be read{first}", advice))
    return checks


def _csv_check(folder: Path, splits: Counter[str]) -> Check:
    """The CSV files are for people and other tools; training reads the Parquet file alone."""
    counts = {}
    for split in ("train", "val"):
        path = folder / f"manifest_{split}.csv"
        if path.exists():
            with path.open(encoding="utf-8-sig", newline="") as file:
                counts[split] = sum(1 for _ in csv.reader(file)) - 1
    found = ", ".join(f"manifest_{split}.csv {counts.get(split, 'is missing')}" for split in ("train", "val"))
    same = all(counts.get(split) == splits[split] for split in ("train", "val"))
    return Check(
        "manifest CSV", True if same else None, found, "" if same else "they are not what manifest.parquet holds"
    )


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
