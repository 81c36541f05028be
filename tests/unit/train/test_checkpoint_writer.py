"""Workers act on a stop request at the same step, also when the sum of their flags arrives some steps later."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pillsnap.runs.checkpoint import Position
from pillsnap.storage import StorageError
from pillsnap.train.checkpoint_writer import CheckpointWriter, _Write


class LaggingGroup:
    """Rank 1 of two workers on GPUs, which read sums two steps after they were started."""

    rank, size, lag_steps = 1, 2, 2

    def sum_later(self, values: torch.Tensor) -> Any:
        return values.tolist

    def any(self, flag: bool) -> bool:
        return flag

    def gather(self, items: list[Any]) -> list[Any]:
        return items


def test_stop_request_is_acted_on_two_steps_later_and_once() -> None:
    requested = {"stop": False}
    job: Any = SimpleNamespace(
        backend=SimpleNamespace(stop_requested=lambda: requested["stop"]), preempted=lambda: False,
        train=SimpleNamespace(checkpoint_minutes=10.0), report=lambda metrics: None,
    )  # fmt: skip
    group: Any = LaggingGroup()
    writer = CheckpointWriter(job, group, state=None, log=None, schedule=None, clock=None)  # type: ignore[arg-type]
    assert [writer.decide().stop for _ in range(4)] == [False] * 4
    requested["stop"] = True
    assert [writer.decide().stop for _ in range(3)] == [False, False, True]
    requested["stop"] = False
    writer.save(Position(0, 7, 7), {}, best=False)
    # The checkpoint also settles the two sums that were pending when it was written.
    assert [writer.decide().save for _ in range(4)] == [False] * 4


class Backend:
    """Publishes by calling `on_publish`, which may raise."""

    def __init__(self, run_dir: Path, on_publish: Callable[[], None]) -> None:
        self.run_dir, self.on_publish = run_dir, on_publish

    def publish(self, path: Path, *, best: bool, branch: bool, keep: int, announce: Callable[[], None]) -> None:
        assert (path / "meta.json").exists() and best and keep == 2
        self.on_publish()
        announce()


def write(run_dir: Path, on_publish: Callable[[], None]) -> tuple[str, list[str]]:
    announced: list[str] = []
    backend: Any = Backend(run_dir, on_publish)
    write = _Write(
        backend, run_dir, Position(1, 0, 10), lambda position, path, best: announced.append(path.name),
        model={"w": torch.ones(1)}, ema={"w": torch.ones(1)}, trainer={}, meta={}, best=True, keep=2,
    )  # fmt: skip
    assert write.wait()
    return write.failure(), announced


def test_published_checkpoint_is_announced(tmp_path: Path) -> None:
    assert write(tmp_path, lambda: None) == ("", ["step-00000010-epoch-0001"])


def test_storage_failure_is_explained_and_nothing_announced(tmp_path: Path) -> None:
    def fail() -> None:
        raise StorageError("s3://b cannot be reached (ACCESS_DENIED): look at its rights.")

    assert write(tmp_path, fail) == (
        "The checkpoint at step 10 could not be published; the one before is intact. s3://b cannot be reached "
        "(ACCESS_DENIED): look at its rights. Then give the same command again.",
        [],
    )


def test_full_disk_is_explained_and_other_errors_are_raised(tmp_path: Path) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    failure, announced = write(tmp_path, full)
    assert failure == (
        f"The checkpoint at step 10 could not be written to {tmp_path} ([Errno 28] No space left on device); "
        "the one before is intact. Free disk space and give the same command again."
    )
    assert announced == []
    with pytest.raises(ZeroDivisionError):
        write(tmp_path, lambda: 1 // 0)  # type: ignore[arg-type,return-value]
