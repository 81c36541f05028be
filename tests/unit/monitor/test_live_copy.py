"""The local copy of a remote run's logs is extended, and replaced when the log is."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from pillsnap.errors import UserError
from pillsnap.monitor import live_copy as module
from pillsnap.monitor.live_copy import _LiveCopy, live_copy
from pillsnap.observe.events import EventFollower, EventLog
from pillsnap.storage import Storage


@pytest.fixture
def storage(s3_environment: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Storage:
    monkeypatch.setenv("PILLSNAP_CACHE_DIR", str(tmp_path / "cache"))
    return Storage(f"{s3_environment}/runs/one")


def publish(storage: Storage, log: EventLog) -> None:
    storage.upload(log.path, "events.jsonl")


def test_only_new_bytes_are_fetched(storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with EventLog(tmp_path / "driver") as log:
        for number in range(50):
            log.write("warning", message=f"number {number}")
        publish(storage, log)
        copy = _LiveCopy(storage.uri)
        assert copy.update()
        follower = EventFollower(copy.local)
        assert len(follower.poll()) == 50

        read: list[int] = []
        original = Storage.read

        def counted(self: Storage, name: str, offset: int = 0) -> bytes | None:
            data = original(self, name, offset)
            read.append(len(data or b""))
            return data

        monkeypatch.setattr(Storage, "read", counted)
        copy.update()
        assert read == []  # unchanged
        log.write("warning", message="one more")
        log.write("examples", task="detection", epoch=1, path="examples/a.png")
        storage.write("examples/a.png", b"picture")
        publish(storage, log)
        copy.update()
        assert sum(read) < 600
    assert [event.get("message") for event in follower.poll()] == ["one more", None]
    assert follower.generation == 0
    assert (copy.local / "events.jsonl").read_bytes() == log.path.read_bytes()
    assert (copy.local / "examples" / "a.png").read_bytes() == b"picture"


@pytest.mark.parametrize("lines", [1, 80])
def test_another_log_replaces_the_copy(storage: Storage, tmp_path: Path, lines: int) -> None:
    with EventLog(tmp_path / "first") as log:
        for number in range(20):
            log.write("warning", message=f"first {number}")
        publish(storage, log)
    copy = _LiveCopy(storage.uri)
    copy.update()
    with EventLog(tmp_path / "second") as log:
        for number in range(lines):
            log.write("warning", message=f"second {number}")
        publish(storage, log)
    copy.update()
    assert (copy.local / "events.jsonl").read_bytes() == log.path.read_bytes()


def test_a_thread_keeps_the_copy_up_to_date(storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_INTERVAL_S", 0.05)
    with EventLog(tmp_path / "driver") as log:
        log.write("warning", message="first")
        publish(storage, log)
        with live_copy(storage.uri) as folder:
            log.write("warning", message="second")
            publish(storage, log)
            for _ in range(200):
                if (folder / "events.jsonl").read_bytes() == log.path.read_bytes():
                    break
                time.sleep(0.05)
            assert (folder / "events.jsonl").read_bytes() == log.path.read_bytes()


def test_missing_run_is_an_error(storage: Storage) -> None:
    with pytest.raises(UserError, match="is not a run"), live_copy(storage.uri):
        pass


def test_a_local_folder_is_returned_unchanged(tmp_path: Path) -> None:
    with live_copy(str(tmp_path)) as folder:
        assert folder == tmp_path
