"""The faults that diagnosis.py recognises. Of several, the first in the list is reported: it causes the later ones."""

from __future__ import annotations

import errno
import re
import resource
import signal
from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """A fault, and by what it is recognised: error numbers, qualified type names, signals, or words of a library."""

    what: str
    cause: str
    advice: str
    errnos: tuple[int, ...] = ()
    types: tuple[str, ...] = ()
    signals: tuple[signal.Signals, ...] = ()
    words: str = ""
    limit: tuple[str, int] | None = None
    """Letter of `ulimit` and resource of the limit that causes it, where one is set."""

    def says(self, line: str) -> bool:
        """Whether the words occur in a line."""
        return bool(self.words) and re.search(self.words, line, re.IGNORECASE) is not None


DISK_FULL = Fault(
    "The disk is full",
    "Checkpoints, Ray's spilled objects (/tmp/ray) or other files took the space.",
    "Free space, lower train.keep_checkpoints or name another --run, then give the same command again: "
    "the last checkpoint is intact.",
    errnos=(errno.ENOSPC, errno.EDQUOT),
    types=("ray.exceptions.OutOfDiskError",),
    words=r"No space left on device|Disk quota exceeded|OutOfDiskError|local disk is full",
)
NOT_WRITTEN = Fault(
    "A file could not be written",
    "The disk was full for a moment, a quota or a limit on file sizes was reached, or the disk fails.",
    "Check `df`, `quota`, `ulimit -f` and `dmesg`, then give the same command again: the last checkpoint is intact.",
    errnos=(errno.EFBIG,),
    words=r"inline_container|PytorchStreamWriter",
    limit=("f", resource.RLIMIT_FSIZE),
)

FAULTS = (
    Fault(
        "The GPU cannot run this build of torch",
        "The NVIDIA driver is older than torch's CUDA, was updated without a restart, or this build does "
        "not support the GPU.",
        "Compare `nvidia-smi` with `python -c 'import torch; print(torch.version.cuda)'`; update the driver and "
        "restart, or install the torch build that fits.",
        words=r"CUDA driver version is insufficient|driver on your system is too old|"
        r"forward compatibility was attempted|no kernel image is available|CUDA_ERROR_SYSTEM_DRIVER_MISMATCH|"
        r"Driver/library version mismatch",
    ),
    Fault(
        "No GPU can be used",
        "CUDA_VISIBLE_DEVICES hides it, another process holds it exclusively, or the machine or container has none.",
        "Check `nvidia-smi` and CUDA_VISIBLE_DEVICES, start containers with --gpus all, then run `pillsnap preflight`.",
        words=r"No CUDA GPUs are available|no NVIDIA driver|CUDA-capable device\(s\) is/are busy|"
        r"invalid device ordinal|no CUDA-capable device|CUDA is not available|NVML.*not (found|initialized)",
    ),
    Fault(
        "The GPU ran out of memory outside a training step's batch, which would have been split",
        "Another process uses the GPU, or the model and its optimizer do not fit.",
        "End the other processes that `nvidia-smi` lists, or choose a smaller model or image_size_px.",
        types=("torch.OutOfMemoryError",),
        words=r"CUDA out of memory|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED|CUDA error: out of memory",
    ),
    DISK_FULL,
    NOT_WRITTEN,
    Fault(
        "Ray's authentication token is missing or wrong",
        "RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token is not that of the cluster.",
        "Copy the token of the cluster's head node, or unset RAY_ADDRESS to start Ray on this machine.",
        types=("ray.exceptions.AuthenticationError",),
        words=r"authentication token|Unauthenticated|InvalidAuthToken",
    ),
    Fault(
        "The path of Ray's sockets is too long",
        "A socket's path may have 107 bytes, and TMPDIR or RAY_TMPDIR is a deep folder.",
        "Set RAY_TMPDIR to a short one, such as /tmp.",
        words=r"AF_UNIX path",
    ),
    Fault(
        "Ray's object store is full",
        "Batches are produced faster than they are used, or /dev/shm is small (Docker gives 64 MB).",
        "Start a container with --shm-size=8g, or lower the batch size or data.batches_per_read.",
        types=("ray.exceptions.ObjectStoreFullError",),
        words=r"object store.*(is full|out of memory)|ObjectStoreFullError",
    ),
    Fault(
        "Too many files are open",
        "The limit on open files is too low for Ray's processes and connections.",
        "Check `ulimit -n` and the container's limits; Ray wants 65536.",
        errnos=(errno.EMFILE, errno.ENFILE),
        words=r"Too many open files",
        limit=("n", resource.RLIMIT_NOFILE),
    ),
    Fault(
        "No further process or thread can be started",
        "The limit on this user's processes, or the container's (--pids-limit), is reached.",
        "Check `ulimit -u` and the container's limits, or lower --num-workers and data.decoding_processes.",
        errnos=(errno.EAGAIN,),
        words=r"can't start new thread|Resource temporarily unavailable|pthread_create",
        limit=("u", resource.RLIMIT_NPROC),
    ),
    Fault(
        "The machine ran out of main memory",
        "Too many decoding tasks or workers at once, or other programs on the machine.",
        "Raise data.decoding_cpus (fewer tasks at once), lower the batch size or --num-workers, or end other programs.",
        errnos=(errno.ENOMEM,),
        types=("builtins.MemoryError", "ray.exceptions.OutOfMemoryError"),
        words=r"running low on memory|memory monitor|ray\.exceptions\.OutOfMemoryError|"
        r"exceeds the memory usage threshold|Cannot allocate memory|DefaultCPUAllocator",
        limit=("v", resource.RLIMIT_AS),
    ),
    Fault(
        "A program library cannot be loaded",
        "The memory of a process is limited, or programs may not be run from the library's folder.",
        "Check `ulimit -v`, the container's memory and the mount's options (noexec).",
        words=r"failed to map segment from shared object",
        limit=("v", resource.RLIMIT_AS),
    ),
    Fault(
        "Ray's head process has ended",
        "It was killed, or its machine was stopped or lost its network.",
        "Give the same command again: it continues from the last checkpoint. For a joined cluster check `ray status`.",
        types=("ray.exceptions.RpcError", "ray.exceptions.LocalRayletDiedError"),
        words=r"GCS.*(died|dead|unavailable|disconnected)|failed to connect to.*GCS.*reconnect|"
        r"raylet.*(died|has died|terminated)",
    ),
    Fault(
        "A machine of the cluster was lost",
        "It was preempted, restarted, or its network failed.",
        "Check `ray status`; give the same command again, or let the number of workers follow the free resources with "
        "--num-workers MIN:MAX.",
        types=("ray.exceptions.NodeDiedError", "ray.exceptions.ObjectLostError", "ray.exceptions.OwnerDiedError"),
        words=r"node.*(died|dead|was terminated|preempted|drained)|NodeDiedError|PreemptionError|"
        r"owner.*node.*has failed|ObjectLostError|OwnerDiedError",
    ),
    Fault(
        "Ray did not start, or its cluster cannot be reached",
        "The machine is overloaded, or RAY_ADDRESS names a cluster that has ended.",
        "Check the load of the machine, `ray status` and RAY_ADDRESS, then give the same command again.",
        words=r"node timed out during startup|Timed out waiting for file \S*_port_|raylet failed to startup|"
        r"Failed to (connect to|get address).*(GCS|Ray)|Could not (find|connect to) any running Ray",
    ),
    Fault(
        "A worker did not answer within train.hang_timeout_s",
        "It hangs in a read of slow storage, is paused or starved of CPU, or its GPU or network hangs.",
        "Check `nvidia-smi`, `dmesg` and the storage; give the same command again, or raise train.hang_timeout_s "
        "where long waits are normal.",
        words=r"Timed out waiting|timed out after|Watchdog caught collective|collective operation timeout|"
        r"WorkerHealthCheckTimeout|health.?check.*(timeout|hanging|timed out)|NCCLHang",
    ),
    Fault(
        "A file is missing",
        "The data or the run directory was moved, or is not mounted on every machine.",
        "Check the named path, --data-root and --run, and run `pillsnap preflight`.",
        errnos=(errno.ENOENT, errno.ENOTDIR),
        words=r"NoSuchBucket|NoSuchKey|Path does not exist",
    ),
    Fault(
        "A file cannot be read or written",
        "It belongs to another user, or its disk is mounted read-only.",
        "Check the owner of the named path, or name another --run.",
        errnos=(errno.EACCES, errno.EPERM, errno.EROFS),
        words=r"AccessDenied",
    ),
    Fault(
        "A disk or network file system fails",
        "The kernel reports an error of the device, or a mount that has gone away.",
        "Check `dmesg` and the mount of the named path, then give the same command again.",
        errnos=(errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ENODEV, errno.EUCLEAN, errno.EREMOTEIO),
    ),
    Fault(
        "The workers could not be started",
        "The cluster has fewer free CPUs or GPUs than they request.",
        "Check `ray status`; lower --num-workers or train.cpus_per_worker, or end other programs on the cluster.",
        words=r"WorkerGroupStartupTimeout|InsufficientClusterResources|placement group.*(timed out|infeasible)|"
        r"startup.*timed? ?out",
    ),
    Fault(
        "A process of the run was stopped by the file system or the shared memory under it",
        "/dev/shm is full (Docker gives 64 MB), or a file was cut while it was mapped.",
        "Start a container with --shm-size=8g, check `df /dev/shm` and the storage, then give the same command again.",
        signals=(signal.SIGBUS,),
        words=r"\bSIGBUS\b(?! or)|Bus error",
    ),
    Fault(
        "A process of the run used an instruction that this CPU lacks",
        "A package was built for a newer CPU.",
        "Run on another machine, or install builds of torch and OpenCV that fit this CPU.",
        signals=(signal.SIGILL,),
        words=r"\bSIGILL\b|Illegal instruction",
    ),
    Fault(
        "A process of the run crashed",
        "Native code of a package or a driver failed, or packages that do not fit each other are installed.",
        "Run `make install` again and `pillsnap preflight`; train.log and `dmesg` may name the library.",
        signals=(signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE),
        words=r"Segmentation fault",
    ),
    Fault(
        "A process of the run used up its CPU time",
        "The limit on CPU time was reached.",
        "Check the batch system's limits, then give the same command again.",
        signals=(signal.SIGXCPU,),
        limit=("t", resource.RLIMIT_CPU),
    ),
    Fault(
        "A process of the run was told to end",
        "A batch system, a container or a person sent it the signal.",
        "Give the same command again: it continues from the last checkpoint.",
        signals=(signal.SIGTERM, signal.SIGHUP, signal.SIGINT),
    ),
    Fault(
        "A worker process died repeatedly",
        "It was killed, most often by the kernel for using too much memory, or it crashed.",
        "Check `dmesg` for 'Out of memory' and train.log, then give the same command again: it continues from the "
        "last checkpoint.",
        types=("ray.exceptions.RayActorError", "ray.exceptions.WorkerCrashedError"),
        signals=(signal.SIGKILL,),
        words=r"ActorDiedError|ActorUnavailableError|WorkerCrashedError|worker (process )?(died|crashed)|"
        r"Connection closed by peer|connection error code|Connection reset by peer",
    ),
)  # fmt: skip
