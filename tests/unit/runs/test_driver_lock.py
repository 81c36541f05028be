"""One driver per run over all machines: live locks are respected, stale ones taken over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pillsnap.errors import UserError
from pillsnap.processes import machine, start_of
from pillsnap.runs import driver_lock
from pillsnap.runs.driver_lock import LOCK_FILE, DriverLock, driving
from pillsnap.storage import Storage, StorageError, scratch


@pytest.fixture
def run_uri(s3_environment: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    monkeypatch.setenv("PILLSNAP_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver_lock, "SETTLE_S", 0.05)
    monkeypatch.setattr(driver_lock, "RENEW_EVERY_S", 0.1)
    monkeypatch.setattr(driver_lock, "DEAD_AFTER_S", 1.0)
    return f"{s3_environment}/runs/one"


def no_lines(line: str) -> None:
    pytest.fail(line)


def test_second_driver_of_this_machine_is_refused_at_once(run_uri: str) -> None:
    with driving(run_uri, no_lines) as folder:
        (folder / "config.json").write_text("{}")
        with pytest.raises(UserError, match=f"Process {os.getpid()} on .* is training in {run_uri}"):
            DriverLock(run_uri, no_lines, lambda: None).acquire()
    assert list(Storage(run_uri).files()) == ["config.json"]
    with driving(run_uri, no_lines) as folder:
        assert (folder / "config.json").exists()


def test_lock_of_another_machine_is_taken_over_when_stale(run_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    first = DriverLock(run_uri, no_lines, lambda: None)
    first._owner["machine"] = "another"
    first.acquire()
    with pytest.raises(UserError, match="is training in"):
        DriverLock(run_uri, lines.append, lambda: None).acquire()
    assert len(lines) == 1 and "waiting up to 1 s" in lines[0]
    first._stop.set()  # as if killed
    first._thread.join()
    started_s = time.monotonic()
    second = DriverLock(run_uri, lines.append, lambda: None)
    second.acquire()
    assert 0.9 <= time.monotonic() - started_s < 3.0
    second.release()
    assert Storage(run_uri).read(LOCK_FILE) is None


def test_lock_of_a_killed_process_is_taken_over_at_once(run_uri: str) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    mark = {"id": "x", "host": "h", "pid": process.pid, "started": start_of(process.pid),
            "machine": machine()}  # fmt: skip
    Storage(run_uri).write(LOCK_FILE, json.dumps(mark).encode())
    with pytest.raises(UserError, match=f"Process {process.pid} on h"):
        DriverLock(run_uri, no_lines, lambda: None).acquire()
    process.kill()  # a zombie counts as ended
    time.sleep(0.2)
    lock = DriverLock(run_uri, no_lines, lambda: None)
    lock.acquire()
    lock.release()
    process.wait()


def test_driver_that_lost_the_run_stops_and_publishes_nothing(run_uri: str) -> None:
    lines: list[str] = []
    with pytest.raises(UserError, match="Another driver has taken over"), driving(run_uri, lines.append) as folder:
        (folder / "config.json").write_text("{}")
        mark = json.loads(Storage(run_uri).read(LOCK_FILE) or b"")
        Storage(run_uri).write(LOCK_FILE, json.dumps(mark | {"id": "another"}).encode())
        end_s = time.monotonic() + 10
        while not (folder / "stop-requested").exists():
            assert time.monotonic() < end_s
            time.sleep(0.02)
    assert list(Storage(run_uri).files()) == [LOCK_FILE]


def test_ending_driver_leaves_the_lock_of_its_successor(run_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_lock, "RENEW_EVERY_S", 3600.0)
    lock = DriverLock(run_uri, no_lines, lambda: None)
    lock.acquire()
    Storage(run_uri).write(LOCK_FILE, json.dumps({"id": "successor", "pid": 1, "host": "h"}).encode())
    lock.release()
    assert json.loads(Storage(run_uri).read(LOCK_FILE) or b"")["id"] == "successor"


@pytest.mark.parametrize("successor", [b'{"id": "successor", "pid": 1, "host": "h"}', None], ids=["runs", "has ended"])
def test_driver_that_slept_publishes_nothing_before_its_next_renewal(
    run_uri: str, successor: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver_lock, "RENEW_EVERY_S", 3600.0)
    lines: list[str] = []
    with pytest.raises(UserError, match="Another driver has taken over"), driving(run_uri, lines.append) as folder:
        (folder / "events.jsonl").write_text("of the driver that slept\n")
        files = {"config.json": b"{}", "events.jsonl": b"of the successor\n"}
        for name, data in files.items():
            Storage(run_uri).write(name, data)
        if successor is None:
            Storage(run_uri).remove(LOCK_FILE)
        else:
            Storage(run_uri).write(LOCK_FILE, successor)
    assert {name: Storage(run_uri).read(name) for name in files} == files


def test_lock_of_a_deleted_run_is_written_again(run_uri: str) -> None:
    """Not taken over: the next checkpoint says what is wrong with the storage."""
    with driving(run_uri, no_lines):
        Storage(run_uri).remove(LOCK_FILE)
        end_s = time.monotonic() + 10
        while Storage(run_uri).read(LOCK_FILE) is None:
            assert time.monotonic() < end_s
            time.sleep(0.02)


def test_missing_storage_is_an_error_before_the_start(s3_environment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match="no-such-bucket"), driving("s3://no-such-bucket/one", no_lines):
        pytest.fail("went on")


def test_local_folder_is_used_as_it_is(tmp_path: Path) -> None:
    with driving(str(tmp_path / "run"), no_lines) as folder:
        assert folder == tmp_path / "run"
    assert list(tmp_path.iterdir()) == []


def test_failed_publishing_does_not_hide_the_first_error(run_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []

    def fail(*_: object) -> None:
        raise StorageError("not now")

    with pytest.raises(UserError, match="the first"), driving(run_uri, lines.append):
        monkeypatch.setattr("pillsnap.runs.mirror.RunMirror.publish", fail)
        raise UserError("the first")
    assert lines == ["the end of the run was not published: not now"]
    assert scratch(run_uri, "driver").exists()
