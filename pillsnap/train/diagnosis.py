"""Explains an exception: what happened, the likely cause, and what to do."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from dataclasses import dataclass

from pillsnap.errors import UserError

_SHOWN_CHARACTERS = 300


@dataclass(frozen=True)
class Diagnosis:
    """Why a run ended."""

    message: str
    cause: str
    advice: str

    def __str__(self) -> str:
        return " ".join(filter(None, (self.message, self.cause, self.advice)))


@dataclass(frozen=True)
class _Known:
    """A fault recognised by the text or the type of an exception."""

    pattern: str
    what: str
    cause: str
    advice: str

    def matches(self, text: str) -> bool:
        return re.search(self.pattern, text, re.IGNORECASE) is not None


# The first match is taken: specific faults are above those that other faults also cause.
_KNOWN = (
    _Known(
        r"CUDA driver version is insufficient|driver on your system is too old|forward compatibility was attempted|"
        r"no kernel image is available|CUDA_ERROR_SYSTEM_DRIVER_MISMATCH|Driver/library version mismatch",
        "The GPU cannot run this build of torch",
        "The NVIDIA driver is older than torch's CUDA, was updated without a restart, or this build does "
        "not support the GPU.",
        "Compare `nvidia-smi` with `python -c 'import torch; print(torch.version.cuda)'`; update the driver and "
        "restart, or install the torch build that fits.",
    ),
    _Known(
        r"No CUDA GPUs are available|no NVIDIA driver|CUDA-capable device\(s\) is/are busy|"
        r"invalid device ordinal|no CUDA-capable device|CUDA is not available|NVML.*not (found|initialized)",
        "No GPU can be used",
        "CUDA_VISIBLE_DEVICES hides it, another process holds it exclusively, or the machine or container has none.",
        "Check `nvidia-smi` and CUDA_VISIBLE_DEVICES, start containers with --gpus all, then run `pillsnap preflight`.",
    ),
    _Known(
        r"CUDA out of memory|OutOfMemoryError: CUDA|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED|"
        r"CUDA error: out of memory",
        "The GPU ran out of memory outside a training step's batch, which would have been split",
        "Another process uses the GPU, or the model and its optimizer do not fit.",
        "End the other processes that `nvidia-smi` lists, or choose a smaller model or image_size_px.",
    ),
    _Known(
        r"No space left on device|Disk quota exceeded|Errno 28|Errno 122|OutOfDiskError|local disk is full",
        "The disk is full",
        "Checkpoints, Ray's spilled objects (/tmp/ray) or other files took the space.",
        "Free space, lower train.keep_checkpoints or name another --run, then give the same command again: "
        "the last checkpoint is intact.",
    ),
    _Known(
        r"ObjectStoreFullError|object store.*(is full|out of memory)",
        "Ray's object store is full",
        "Batches are produced faster than they are used, or /dev/shm is small (Docker gives 64 MB).",
        "Start a container with --shm-size=8g, or lower the batch size or data.batches_per_read.",
    ),
    _Known(
        r"running low on memory|memory monitor|ray\.exceptions\.OutOfMemoryError|exceeds the memory usage threshold|"
        r"OOM-?kill|Cannot allocate memory|DefaultCPUAllocator|MemoryError",
        "The machine ran out of main memory",
        "Too many decoding tasks or workers at once, or other programs on the machine.",
        "Raise data.decoding_cpus (fewer tasks at once), lower the batch size or --num-workers, or end other programs.",
    ),
    _Known(
        r"node.*(died|dead|was terminated|preempted|drained)|NodeDiedError|PreemptionError|"
        r"owner.*node.*has failed|ObjectLostError|OwnerDiedError",
        "A machine of the cluster was lost",
        "It was preempted, restarted, or its network failed.",
        "Check `ray status`; give the same command again, or let the number of workers follow the free resources with "
        "--num-workers MIN:MAX.",
    ),
    _Known(
        r"node timed out during startup|raylet failed to startup|Failed to (connect to|get address).*(GCS|Ray)|"
        r"Could not (find|connect to) any running Ray|ConnectionError: ray",
        "Ray did not start, or its cluster cannot be reached",
        "The machine is overloaded, or RAY_ADDRESS names a cluster that has ended.",
        "Check the load of the machine, `ray status` and RAY_ADDRESS, then give the same command again.",
    ),
    _Known(
        r"Timed out waiting|timed out after|Watchdog caught collective|collective operation timeout|"
        r"WorkerHealthCheckTimeout|health.?check.*(timeout|hanging|timed out)|NCCLHang",
        "A worker did not answer within train.hang_timeout_s",
        "It hangs in a read of slow storage, is paused or starved of CPU, or its GPU or network hangs.",
        "Check `nvidia-smi`, `dmesg` and the storage; give the same command again, or raise train.hang_timeout_s "
        "where long waits are normal.",
    ),
    _Known(
        r"FileNotFoundError|No such file or directory|NotADirectoryError|NoSuchBucket|NoSuchKey|Path does not exist",
        "A file is missing",
        "The data or the run directory was moved, or is not mounted on every machine.",
        "Check the named path, --data-root and --run, and run `pillsnap preflight`.",
    ),
    _Known(
        r"PermissionError|Permission denied|AccessDenied|Read-only file system",
        "A file cannot be read or written",
        "It belongs to another user, or its disk is mounted read-only.",
        "Check the owner of the named path, or name another --run.",
    ),
    _Known(
        r"WorkerGroupStartupTimeout|InsufficientClusterResources|placement group.*(timed out|infeasible)|"
        r"startup.*timed? ?out",
        "The workers could not be started",
        "The cluster has fewer free CPUs or GPUs than they request.",
        "Check `ray status`; lower --num-workers or train.cpus_per_worker, or end other programs on the cluster.",
    ),
    _Known(
        r"ActorDiedError|ActorUnavailableError|WorkerCrashedError|worker (process )?(died|crashed)|"
        r"Connection closed by peer|connection error code|Connection reset by peer|SIGKILL|exit code",
        "A worker process died repeatedly",
        "It was killed, most often by the kernel for using too much memory, or it crashed.",
        "Check `dmesg` for 'Out of memory' and train.log, then give the same command again: it continues from the "
        "last checkpoint.",
    ),
)  # fmt: skip


def diagnose(error: BaseException) -> Diagnosis:
    """Explain an exception of Ray, torch or the operating system to the user who started the run."""
    chain = list(_chain(error))
    for link in chain:
        if isinstance(link, UserError):
            return Diagnosis(str(link), "", "")
    text = "\n".join(f"{type(link).__module__}.{type(link).__name__}: {link}" for link in chain)
    if any(isinstance(link, OSError) and link.errno in (errno.ENOSPC, errno.EDQUOT) for link in chain):
        text += "\nNo space left on device"
    detail = _last_line(str(chain[-1])) or type(chain[-1]).__name__
    for known in _KNOWN:
        if known.matches(text):
            return Diagnosis(
                f"{known.what} ({_line_that_matches(known.pattern, text) or detail}).", known.cause, known.advice
            )
    return Diagnosis(
        f"Training failed: {detail[:_SHOWN_CHARACTERS]}",
        "The fault is not a known one.",
        "The full trace is in train.log; give the same command again to continue from the last checkpoint.",
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The exception and its causes; Ray keeps the workers' exceptions in its own fields."""
    seen: set[int] = set()
    waiting: list[BaseException] = [error]
    while waiting:
        link = waiting.pop(0)
        if id(link) in seen:
            continue
        seen.add(id(link))
        yield link
        failures = getattr(link, "worker_failures", None)
        inner = [*failures.values()] if isinstance(failures, dict) else []
        inner += [getattr(link, "controller_failure", None), getattr(link, "cause", None), link.__cause__]
        waiting += [item for item in inner if isinstance(item, BaseException)]


def _line_that_matches(pattern: str, text: str) -> str:
    for line in text.splitlines():
        if re.search(pattern, line, re.IGNORECASE):
            return " ".join(line.split())[:_SHOWN_CHARACTERS]
    return ""


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
