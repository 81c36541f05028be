"""What workers hand in is kept in order, from one start of the workers at a time, and published before it counts."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest
import torch

from pillsnap.errors import UserError
from pillsnap.observe.events import encode_event, read_events
from pillsnap.observe.logs import setup_logging
from pillsnap.runs import mirror
from pillsnap.runs.checkpoint import Position
from pillsnap.runs.relay import Desk
from pillsnap.storage import Storage, StorageError, scratch
from pillsnap.train.checkpoint_writer import _Writer


@pytest.fixture
def uri(s3_environment: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    monkeypatch.setenv("PILLSNAP_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(mirror, "PUBLISH_EVERY_S", 3600.0)  # only what the test asks for
    return f"{s3_environment}/runs/one"


@pytest.fixture
def desk(uri: str) -> Desk:
    return Desk(uri, str(scratch(uri, "driver")))


def line(message: str) -> bytes:
    return encode_event("warning", time.time(), {"message": message})


def messages(where: str | Path) -> list[str]:
    return [event["message"] for event in read_events(where)]


def test_events_of_an_earlier_start_are_dropped(desk: Desk, uri: str) -> None:
    desk.open("first")
    desk.append("first", line("1"))
    desk.open("second")
    desk.append("first", line("too late"))
    desk.append("second", line("2"))
    desk.flush("second")
    assert messages(uri) == ["1", "2"]
    with pytest.raises(UserError, match="was replaced"):
        desk.flush("first")


def test_a_flush_publishes_all_that_came_before(desk: Desk, uri: str) -> None:
    time.sleep(1.2)  # the first publishing of its thread is over
    desk.open("first")
    for number in range(100):
        desk.append("first", line(str(number)))
    desk.keep("examples/a.png", b"picture")
    desk.log("a line of a worker")
    assert messages(uri) == []
    desk.flush("first")
    assert messages(uri) == [str(number) for number in range(100)]
    assert Storage(uri).read("examples/a.png") == b"picture"
    assert Storage(uri).read("train.log") == b"a line of a worker\n"
    assert desk.read("examples/a.png") == b"picture" and desk.read("memory.json") is None


def test_storage_that_is_gone_stops_a_flush_and_not_the_events(
    desk: Desk, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.open("first")
    monkeypatch.setattr(Storage, "upload", _no_rights)
    desk.append("first", line("1"))
    with pytest.raises(StorageError, match="ACCESS_DENIED"):
        desk.flush("first")
    assert messages(scratch(uri, "driver")) == ["1"]


def _no_rights(*_: object) -> None:
    raise StorageError("s3://b cannot be reached (ACCESS_DENIED): look at its rights.")


def test_a_driver_that_lost_the_run_publishes_nothing(desk: Desk, uri: str) -> None:
    desk.open("first")
    (scratch(uri, "driver") / ".lost").touch()
    with pytest.raises(UserError, match="Another driver"):
        desk.flush("first")


def test_a_stop_is_asked_for_by_a_file(desk: Desk, uri: str) -> None:
    assert not desk.stop_requested()
    (scratch(uri, "driver") / "stop-requested").touch()
    assert desk.stop_requested()


def test_log_lines_are_sent_with_secrets_masked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-key-of-some-length")
    lines: list[str] = []
    setup_logging(tmp_path / "run", "INFO", rank=3, send=lines.append)
    try:
        logging.getLogger("pillsnap.train").warning("refused for a-key-of-some-length")
    finally:
        setup_logging(tmp_path / "other")
    assert len(lines) == 1
    assert lines[0].endswith("refused for ***") and "rank 3" in lines[0]
    assert not (tmp_path / "run" / "train.log").exists()


def write(folder: Path, publish: object) -> tuple[str, list[str]]:
    announced: list[str] = []
    writer = _Writer(
        folder, Position(1, 0, 10), lambda position, path, best: announced.append(path.name), publish,  # type: ignore[arg-type]
        model={"w": torch.ones(1)}, ema={"w": torch.ones(1)}, trainer={}, meta={}, best=True, keep=2,
    )  # fmt: skip
    return writer.wait(), announced


def test_a_checkpoint_that_cannot_be_published_says_so(tmp_path: Path) -> None:
    def publish(path: Path, *, best: bool, keep: int, announce: object) -> None:
        assert (path / "meta.json").exists() and best and keep == 2
        _no_rights()

    failure, announced = write(tmp_path, publish)
    assert failure == (
        "The checkpoint at step 10 could not be published; the one before is intact. s3://b cannot be reached "
        "(ACCESS_DENIED): look at its rights. Then give the same command again."
    )
    assert announced == []


def test_a_checkpoint_is_announced_by_whom_publishes_it(tmp_path: Path) -> None:
    def publish(path: Path, *, best: bool, keep: int, announce: object) -> None:
        announce()  # type: ignore[operator]

    assert write(tmp_path, publish) == ("", ["step-00000010-epoch-0001"])
    assert write(tmp_path / "local", None) == ("", ["step-00000010-epoch-0001"])
