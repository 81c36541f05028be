"""Every known fault is recognised, with its cause and advice."""

from __future__ import annotations

import errno
import os

import pytest
import torch
from ray.exceptions import ActorDiedError, NodeDiedError, OutOfDiskError
from ray.train import WorkerGroupError

from pillsnap.errors import UserError
from pillsnap.train.diagnosis import diagnose


@pytest.mark.parametrize(
    "error, what, advice",
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
            "GPU ran out of memory",
            "nvidia-smi",
        ),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/x"), "disk is full", "Free space"),
        (OutOfDiskError("local disk is full"), "disk is full", "Free space"),
        (RuntimeError("No CUDA GPUs are available"), "No GPU can be used", "CUDA_VISIBLE_DEVICES"),
        (RuntimeError("Found no NVIDIA driver on your system."), "No GPU can be used", "preflight"),
        (
            RuntimeError("The NVIDIA driver on your system is too old (found version 11040)"),
            "cannot run this build",
            "driver",
        ),
        (
            RuntimeError("CUDA error: no kernel image is available for execution"),
            "cannot run this build",
            "torch build",
        ),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/srv/pills"), "file is missing", "--data-root"),
        (PermissionError(errno.EACCES, "Permission denied", "/srv/run"), "cannot be read or written", "--run"),
        (NodeDiedError("node 10.0.0.7 died"), "machine of the cluster was lost", "ray status"),
        (ActorDiedError(), "worker process died", "dmesg"),
        (RuntimeError("Timed out waiting 90000ms for recv operation to complete"), "did not answer", "hang_timeout_s"),
        (Exception("The current node timed out during startup."), "Ray did not start", "RAY_ADDRESS"),
        (MemoryError(), "ran out of main memory", "decoding_cpus"),
        (KeyError("surprise"), "Training failed", "train.log"),
    ],
)
def test_known_faults_have_message_cause_and_advice(error: Exception, what: str, advice: str) -> None:
    found = diagnose(error)
    assert what in found.message
    assert advice in found.advice
    assert found.cause
    assert "\n" not in str(found)


def test_worker_exception_is_found_inside_rays() -> None:
    inner = RuntimeError("CUDA driver version is insufficient for CUDA runtime version")
    found = diagnose(WorkerGroupError("2 workers failed", {1: inner}))
    assert "cannot run this build" in found.message and "insufficient" in found.message


def test_user_errors_are_kept_as_they_are() -> None:
    outer = RuntimeError("wrapped")
    outer.__cause__ = UserError("The data root /x is not a folder: give --data-root.")
    assert str(diagnose(outer)) == "The data root /x is not a folder: give --data-root."
