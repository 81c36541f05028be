"""The Ray session of one command: an existing cluster, or a local one that ends with the command."""

from __future__ import annotations

import logging
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from pillsnap.cluster.interruption import interrupted_by, stoppable
from pillsnap.config import Settings
from pillsnap.data.malloc import return_freed_memory
from pillsnap.errors import UserError
from pillsnap.ray_compat.capabilities import VARIABLE, capabilities, public_only
from pillsnap.ray_compat.isolation import own_import_path
from pillsnap.ray_compat.minimal_cluster import local_cluster
from pillsnap.storage import one_line

_log = logging.getLogger(__name__)
_JOIN_S = 50.0
_PARTS = ("raylet", "gcs_server")


class RayLost(UserError):
    """A process without which the local Ray cannot work has ended."""

    def __init__(self, name: str, pid: int, reason: str = "it was killed, or the memory ran out (`dmesg`)") -> None:
        super().__init__(
            f"Ray's head process has ended ({name}, process {pid}): {reason}. "
            "Give the same command again; a training continues from its last checkpoint."
        )


def rays_folder() -> str:
    """The folder in which Ray on this machine makes `ray/`, with its sessions and sockets."""
    return os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"


@contextmanager
def ray_session() -> Iterator[None]:
    """Connect to the cluster of RAY_ADDRESS, or start one on this machine and shut it down at the end.

    The folder of a local cluster's logs is removed, unless the body raises.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    variables = {"RAY_TRAIN_ENABLE_STATE_TRACKING": "0", "RAY_TRAIN_V2_ENABLED": "1", "YOLO_AUTOINSTALL": "False"}
    if os.environ.get("RAY_ADDRESS"):
        _join(variables | ({VARIABLE: os.environ[VARIABLE]} if public_only() else {}))
        with _connected():
            yield
        return
    # Workers inherit it. As a runtime environment it would keep out the processes that Ray starts beforehand.
    os.environ.update(variables)
    with ExitStack() as stack:
        with stoppable(look=_lost_part()):
            folder = stack.enter_context(local_cluster(logging_level=logging.ERROR))
        with _connected(), _watched():
            yield
    shutil.rmtree(folder, ignore_errors=True)
    latest = folder.with_name("session_latest")
    if latest.is_symlink() and not latest.exists():
        latest.unlink(missing_ok=True)


def _join(variables: dict[str, str]) -> None:
    """Connect to the cluster of RAY_ADDRESS; UserError when it does not answer."""
    import ray

    where = f"RAY_ADDRESS={os.environ['RAY_ADDRESS']}"
    advice = "check the address, `ray status` and the network, or unset RAY_ADDRESS to start Ray on this machine."
    late = UserError(f"No cluster of Ray answered at {where} within {_JOIN_S:.0f} s: {advice}")
    with own_import_path() as options, stoppable(_JOIN_S, late):
        try:
            ray.init(
                address="auto",
                runtime_env={"env_vars": variables},
                log_to_driver=False,
                logging_level=logging.ERROR,
                **options,
            )
        except (ConnectionError, ValueError) as error:  # the latter for an address of another form
            raise UserError(f"No cluster of Ray can be joined at {where} ({one_line(error)}): {advice}") from error


def _parts() -> tuple[dict[int, str], dict[int, str]]:
    """The raylet and the GCS that this process started, by number: those that run, and those that have ended and were
    not waited for.
    """
    running: dict[int, str] = {}
    ended: dict[int, str] = {}
    for child in psutil.Process().children():
        with suppress(psutil.Error):  # it may have exited meanwhile
            if child.name() in _PARTS:
                found = ended if child.status() == psutil.STATUS_ZOMBIE else running
                found[child.pid] = child.name()
    return running, ended


def _lost_part() -> Callable[[], RayLost | None]:
    """A function that tells which part has ended; Ray itself waits 30 s for it to start."""
    seen: dict[int, str] = {}

    def look() -> RayLost | None:
        running, ended = _parts()
        seen.update(running | ended)
        lost = next((pid for pid in seen if pid not in running), None)
        if lost is None:
            return None
        ending = _ending(lost)
        if ending in ("", "SIGKILL", "SIGTERM"):
            return RayLost(seen[lost], lost)
        logs = os.path.join(rays_folder(), "ray/session_latest/logs")
        return RayLost(seen[lost], lost, f"it stopped by itself ({ending}), and says why in {logs}/{seen[lost]}.err")

    return look


def _ending(pid: int) -> str:
    """The signal or the exit code that ended a process which was not waited for; "" when the kernel does not tell."""
    with suppress(OSError, IndexError, ValueError):
        status = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[49])
        code = os.waitstatus_to_exitcode(status)
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return ""


@contextmanager
def _watched() -> Iterator[None]:
    """Raise RayLost in the body when the raylet or the GCS that this process started has ended."""
    with ExitStack() as stack:
        causes: dict[int, BaseException] = {}
        for pid, name in _parts()[0].items():
            with suppress(OSError):  # old kernels and sandboxes have no pidfd
                descriptor = os.pidfd_open(pid)
                stack.callback(os.close, descriptor)
                causes[descriptor] = RayLost(name, pid)
        stack.enter_context(interrupted_by(causes))
        yield


@contextmanager
def _connected() -> Iterator[None]:
    # Ray Data reads the environment when it is imported.
    import ray.data
    import ray.train

    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    _log.info("Ray %s: %s", ray.__version__, capabilities(), extra={"file_only": True})
    try:
        yield
    finally:
        ray.shutdown()
        return_freed_memory()  # a program that trains repeatedly would keep the memory of each run


@dataclass(frozen=True)
class Workers:
    """Number of train workers: as many as fit, from `least` to `most`."""

    least: int
    most: int
    use_gpu: bool

    def __str__(self) -> str:
        return str(self.most) if self.least == self.most else f"{self.least}:{self.most}"


def count_workers(settings: Settings) -> Workers:
    """The train workers that the settings ask for. Raises UserError when the cluster cannot hold them."""
    import ray

    resources = ray.cluster_resources()
    num_gpus, num_cpus = int(resources.get("GPU", 0)), resources.get("CPU", 0.0)
    if settings.train.device == "cpu":
        num_gpus = 0
    elif settings.train.device == "gpu" and not num_gpus:
        raise UserError(
            f"train.device=gpu, but Ray has no GPU on its {_count_nodes()}: look at `ray status` and `nvidia-smi`, "
            "or train on CPUs with --set train.device=cpu."
        )
    asked = str(settings.train.num_workers)
    if asked == "auto":
        asked = str(max(1, num_gpus))
    least, _, most = asked.partition(":")
    workers = Workers(int(least), int(most or least), num_gpus > 0)
    if workers.use_gpu and workers.least > num_gpus:
        raise UserError(
            f"{workers} workers were asked for, but Ray has {num_gpus} GPUs on its {_count_nodes()}: "
            f"set --num-workers to {num_gpus} or 'auto'."
        )
    left = num_cpus - workers.least * settings.train.cpus_per_worker
    if left < settings.data.decoding_cpus:
        raise UserError(
            f"{workers.least} workers with {settings.train.cpus_per_worker} CPUs each leave {left:.2f} of "
            f"{num_cpus:.0f} CPUs, and one decoding task needs {settings.data.decoding_cpus}: "
            "lower --num-workers, train.cpus_per_worker or data.decoding_cpus."
        )
    for task in settings.tasks if workers.least == workers.most else ():
        batch_size = getattr(settings, task).batch_size
        if batch_size % workers.most:
            raise UserError(
                f"{task}.batch_size {batch_size} cannot be shared by {workers.most} workers evenly: "
                f"choose a multiple of {workers.most}."
            )
    return workers


def _count_nodes() -> str:
    import ray

    number = sum(bool(node["Alive"]) for node in ray.nodes())
    return f"{number} nodes" if number > 1 else "one node"
