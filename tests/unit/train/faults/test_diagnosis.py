"""Every known fault is recognised, with its cause and advice."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
from pathlib import Path

import pytest
import torch
from ray.exceptions import (
    ActorDiedError,
    AuthenticationError,
    LocalRayletDiedError,
    NodeDiedError,
    OutOfDiskError,
    RayTaskError,
    RpcError,
)
from ray.train import WorkerGroupError

from pillsnap.errors import UserError
from pillsnap.train.faults import diagnosis
from pillsnap.train.faults.diagnosis import diagnose


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
        (RuntimeError("Timed out waiting for file /r/gcs_server_port_1f."), "Ray did not start", "RAY_ADDRESS"),
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


def remote(error: Exception) -> RayTaskError:
    """An error as Ray brings it from a worker."""
    return RayTaskError("work", "Traceback\n  in work: No CUDA GPUs are available\nlast", error)


def wrapped(error: Exception) -> Exception:
    """An error that another was raised from, two times, in a worker group."""
    outer = ValueError("could not save")
    outer.__cause__ = remote(error)
    return WorkerGroupError("1 worker failed", {0: outer})


def in_handler(error: Exception, later: Exception) -> Exception:
    """An error raised while another was handled, without `from`."""
    try:
        try:
            raise error
        except Exception:
            raise later  # noqa: B904
    except Exception as caught:
        return caught


def writer_error() -> Exception:
    """What torch raises when the disk is full."""
    with pytest.raises(RuntimeError) as caught:
        torch.save({"a": torch.zeros(10**6)}, "/dev/full")
    return caught.value


@pytest.mark.parametrize(
    "error, what, advice",
    [
        # Error numbers, in any language and through any number of causes.
        (OSError(errno.ENOSPC, "Kein Speicherplatz mehr"), "disk is full", "Free space"),
        (wrapped(OSError(errno.EDQUOT, "quota")), "disk is full", "Free space"),
        (in_handler(OSError(errno.ENOSPC, "x"), RuntimeError("not saved")), "disk is full", "Free space"),
        (wrapped(OSError(errno.EMFILE, "x")), "Too many files are open", "ulimit -n"),
        (BlockingIOError(errno.EAGAIN, "x"), "No further process", "ulimit -u"),
        (RuntimeError("can't start new thread"), "No further process", "ulimit -u"),
        (wrapped(OSError(errno.ESTALE, "x")), "network file system fails", "dmesg"),
        (OSError(errno.EIO, "x"), "network file system fails", "dmesg"),
        (OSError(errno.ENOMEM, "x"), "ran out of main memory", "decoding_cpus"),
        (OSError(errno.EFBIG, "x"), "could not be written", "ulimit -f"),
        (RuntimeError("I/O error: gone (os error 28)"), "disk is full", "Free space"),
        # Exit signals.
        (subprocess.CalledProcessError(-7, ["x"]), "shared memory", "--shm-size"),
        (subprocess.CalledProcessError(132, ["x"]), "instruction that this CPU lacks", "fit this CPU"),
        (wrapped(RuntimeError("A decode worker died (signal 11).")), "crashed", "make install"),
        (RuntimeError("A decode worker died (signal 9)."), "worker process died", "dmesg"),
        (RuntimeError("A decode worker died (signal 15)."), "told to end", "same command"),
        # Ray.
        (AuthenticationError("no token"), "token is missing or wrong", "RAY_ADDRESS"),
        (OSError("AF_UNIX path length cannot exceed 107 bytes: /x"), "sockets", "RAY_TMPDIR"),
        (RpcError("GCS unavailable", rpc_code=14), "head process has ended", "same command"),
        (LocalRayletDiedError("gone"), "head process has ended", "same command"),
    ],
)  # fmt: skip
def test_facts_decide(error: Exception, what: str, advice: str) -> None:
    found = diagnose(error)
    assert what in found.message, found
    assert advice in found.advice


@pytest.mark.parametrize(
    "error",
    [
        KeyError("node died"),
        ValueError("photo 'Permission denied.png' of a class 'worker died'"),
        TypeError("timed out after 3 s"),
        AssertionError("the stream is at exit code 9"),
        ImportError("libcuda.so.1: cannot open shared object file: No such file or directory"),
        in_handler(FileNotFoundError(errno.ENOENT, "no cache", "/x"), ZeroDivisionError("division by zero")),
        wrapped(KeyError("No space left on device")),
    ],
)
def test_what_is_not_known_gets_no_advice_but_the_log(error: Exception) -> None:
    found = diagnose(error, "pillsnap export", Path("/runs/a/error.log"))
    assert found.message.startswith("pillsnap export failed: ")
    assert (found.cause, found.advice) == ("The fault is not a known one.", "The full trace is in /runs/a/error.log.")


def test_the_cause_is_told_rather_than_its_consequences() -> None:
    full, lost = OSError(errno.ENOSPC, "x", "/data/a"), ActorDiedError()
    assert "disk is full" in diagnose(WorkerGroupError("2 workers failed", {0: lost, 1: full})).message
    group = ExceptionGroup("two", [RuntimeError("Timed out waiting"), torch.OutOfMemoryError("CUDA out of memory")])
    assert "GPU ran out of memory" in diagnose(group).message
    assert "worker process died" in diagnose(remote(lost)).message


def test_torchs_writer_says_why_from_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "could not be written" in diagnose(writer_error(), folder=tmp_path).message
    monkeypatch.setattr(diagnosis, "_FULL_BYTES", 2**62)
    assert "disk is full" in diagnose(wrapped(writer_error()), folder=tmp_path).message


def test_limits_of_the_process_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (4096 * 1024 if kind == resource.RLIMIT_AS else 77, 0))
    assert "`ulimit -v` is 4096." in diagnose(MemoryError()).cause
    assert "`ulimit -u` is 77." in diagnose(RuntimeError("can't start new thread")).cause
    assert "`ulimit -n` is 77." in diagnose(OSError(errno.EMFILE, "x")).cause
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY, 0))
    assert "ulimit" not in diagnose(MemoryError()).cause


def test_a_library_that_the_loader_cannot_map(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (3_000_000 * 1024, 0))
    text = "libtorch_cpu.so: failed to map segment from shared object"
    found = diagnose(ImportError(text, name="_C", path="/venv/torch/_C.cpython-311-x86_64-linux-gnu.so"))
    assert str(found).startswith(f"A program library cannot be loaded ({text})")
    assert "`ulimit -v` is 3000000." in found.cause and "noexec" in found.advice
    assert "not a known one" in diagnose(ImportError(text, name="mine", path="/mine.py")).cause


def test_an_actor_that_may_not_read_its_file_was_not_killed() -> None:
    from ray.exceptions import ActorDiedError

    error = ActorDiedError()
    error.error_msg = (
        "The actor died because of an error\nPermissionError: [Errno 13] Permission denied: '/runs/best.json'"
    )
    assert str(diagnose(error)).startswith("A file cannot be read or written (")
    assert "owner" in diagnose(error).advice
