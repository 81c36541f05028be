"""The relay writes what one start of the workers sends, in order, and publishes it on flush."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pillsnap.errors import UserError
from pillsnap.observe.events import encode_event, read_events
from pillsnap.observe.logs import setup_logging
from pillsnap.runs import mirror
from pillsnap.runs.relay import Relay
from pillsnap.storage import Storage, StorageError, scratch


@pytest.fixture
def uri(s3_environment: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    monkeypatch.setenv("PILLSNAP_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(mirror, "PUBLISH_EVERY_S", 3600.0)  # publish on flush only
    return f"{s3_environment}/runs/one"


@pytest.fixture
def relay(uri: str) -> Iterator[Relay]:
    relay = Relay(uri, str(scratch(uri, "driver")))
    yield relay
    relay.close()


def line(message: str) -> bytes:
    return encode_event("warning", time.time(), {"message": message})


def messages(where: str | Path) -> list[str]:
    return [event["message"] for event in read_events(where)]


def test_events_of_a_replaced_sender_are_dropped(relay: Relay, uri: str) -> None:
    relay.open("first")
    relay.append("first", line("1"))
    relay.open("second")
    relay.append("first", line("too late"))
    relay.append("second", line("2"))
    relay.flush("second")
    assert messages(uri) == ["1", "2"]
    with pytest.raises(UserError, match="was replaced"):
        relay.flush("first")


def test_flush_publishes_everything_received(relay: Relay, uri: str) -> None:
    time.sleep(1.2)  # the thread has published once
    relay.open("first")
    for number in range(100):
        relay.append("first", line(str(number)))
    relay.write_file("examples/a.png", b"picture")
    relay.log("a line of a worker")
    assert messages(uri) == []
    relay.flush("first")
    assert messages(uri) == [str(number) for number in range(100)]
    assert Storage(uri).read("examples/a.png") == b"picture"
    assert Storage(uri).read("train.log") == b"a line of a worker\n"
    assert relay.read("examples/a.png") == b"picture" and relay.read("memory.json") is None


def test_unreachable_storage_fails_flush_but_keeps_events(
    relay: Relay, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    relay.open("first")
    monkeypatch.setattr(Storage, "upload", _no_rights)
    relay.append("first", line("1"))
    with pytest.raises(StorageError, match="ACCESS_DENIED"):
        relay.flush("first")
    assert messages(scratch(uri, "driver")) == ["1"]


def _no_rights(*_: object) -> None:
    raise StorageError("s3://b cannot be reached (ACCESS_DENIED): look at its rights.")


def test_driver_that_lost_the_run_publishes_nothing(relay: Relay, uri: str) -> None:
    relay.open("first")
    (scratch(uri, "driver") / ".lost").touch()
    with pytest.raises(UserError, match="Another driver"):
        relay.flush("first")


def test_stop_file_requests_a_stop(relay: Relay, uri: str) -> None:
    assert not relay.stop_requested()
    (scratch(uri, "driver") / "stop-requested").touch()
    assert relay.stop_requested()


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
