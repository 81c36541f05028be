"""The two backends of a run: a folder, and the relay with remote storage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from pillsnap.errors import UserError
from pillsnap.observe.events import read_events
from pillsnap.runs import driver_lock, mirror
from pillsnap.runs.backend import LocalBackend, RunBackend, connect
from pillsnap.runs.checkpoint import Position, save_checkpoint
from pillsnap.runs.directory import MEMORY_FILE, STOP_FILE
from pillsnap.runs.driver_lock import DriverLock, driving
from pillsnap.runs.relay import Relay
from pillsnap.runs.remote_checkpoints import PublishedCheckpoints
from pillsnap.storage import Storage, scratch


def commit(backend: RunBackend, epoch: int) -> Path:
    weights = {"w": torch.full((2,), float(epoch))}
    return save_checkpoint(
        backend.run_dir / "checkpoints" / "detection", Position(epoch, 0, epoch), model=weights, ema=weights,
        trainer={}, meta={"elapsed_s": 1.0}, best=True, keep=2,
    )  # fmt: skip


def test_folder_counts_as_written(tmp_path: Path) -> None:
    backend = connect(str(tmp_path), "", None, task="detection", rank=0)
    assert isinstance(backend, LocalBackend)
    assert backend.send_log is None and backend.run_dir == tmp_path
    assert backend.last_checkpoint() == (None, [])
    with backend.become_writer() as events:
        events.write("warning", message="first")
        path = commit(backend, 1)
        backend.publish(path, best=True, keep=2, announce=lambda: events.write("warning", message="announced"))
    assert [event["message"] for event in read_events(tmp_path)] == ["first", "announced"]
    last, damaged = backend.last_checkpoint()
    assert last is not None and last.path == path and damaged == []
    assert not backend.stop_requested()
    (tmp_path / STOP_FILE).touch()
    assert backend.stop_requested()


class RemoteCalls:
    """Calls a relay in this process through the interface of Ray's actor handles."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay

    def __getattr__(self, name: str) -> Any:
        class Method:
            remote = staticmethod(getattr(self._relay, name))

        return Method


@pytest.fixture
def relay(s3_environment: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Relay]:
    """The relay of `s3_environment`/run; `ray.get` and `ray.wait` return at once."""
    import ray

    monkeypatch.setenv("PILLSNAP_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(mirror, "PUBLISH_EVERY_S", 3600.0)
    monkeypatch.setattr(ray, "get", lambda value, timeout=None: value)
    monkeypatch.setattr(ray, "wait", lambda values, timeout: (values, []))
    uri = f"{s3_environment}/run"
    scratch(uri, "driver").mkdir(parents=True)
    relay = Relay(uri, str(scratch(uri, "driver")))
    yield relay
    relay.close()


def test_remote_run_is_published_through_the_relay(s3_environment: str, relay: Relay) -> None:
    uri, handle = f"{s3_environment}/run", RemoteCalls(relay)
    relay.write_file(MEMORY_FILE, b'{"detection": 4}')
    backend = connect("unused", uri, handle, task="detection", rank=0)
    assert backend.run_dir == scratch(uri, "worker")
    assert (backend.run_dir / MEMORY_FILE).read_bytes() == b'{"detection": 4}'
    assert backend.last_checkpoint() == (None, [])
    with backend.become_writer() as events:
        events.write("warning", message="before")
        path = commit(backend, 1)
        picture = backend.run_dir / "examples" / "a.png"
        picture.parent.mkdir()
        picture.write_bytes(b"picture")
        backend.share(picture)
        assert Storage(uri).read("checkpoints/detection/last.json") is None
        backend.publish(path, best=True, keep=2, announce=lambda: events.write("warning", message="announced"))
    assert [event["message"] for event in read_events(uri)] == ["before", "announced"]
    assert Storage(uri).read("examples/a.png") == b"picture"
    last, damaged = connect("unused", uri, handle, task="detection", rank=1).last_checkpoint()
    assert last is not None and last.position == Position(1, 0, 1) and damaged == []


def test_replaced_writer_cannot_publish(s3_environment: str, relay: Relay) -> None:
    uri, handle = f"{s3_environment}/run", RemoteCalls(relay)
    backend = connect("unused", uri, handle, task="detection", rank=0)
    with backend.become_writer() as events:
        path = commit(backend, 1)
        relay.open("another start of the workers")
        with pytest.raises(UserError, match="was replaced"):
            backend.publish(path, best=True, keep=2, announce=lambda: events.write("warning", message="late"))
    assert Storage(uri).read("checkpoints/detection/last.json") is None
    assert read_events(uri) == []


class Successor:
    """A driver on another machine that takes the run over and publishes the same position."""

    def __init__(self, uri: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self._uri, self._monkeypatch, self._folder = uri, monkeypatch, folder
        self.files: dict[str, bytes | None] = {}

    def take_over(self) -> None:
        if self.files:
            return
        with self._monkeypatch.context() as its_machine:
            its_machine.setenv("PILLSNAP_CACHE_DIR", str(self._folder))
            DriverLock(self._uri, lambda line: None, lambda: None)._write()
            store = PublishedCheckpoints(self._uri, "detection", "worker")
            weights = {"w": torch.full((2,), 7.0)}
            path = save_checkpoint(
                store.folder, Position(1, 0, 1), model=weights, ema=weights, trainer={}, meta={"elapsed_s": 2.0},
                best=True, keep=2,
            )  # fmt: skip
            store.publish(path, best=True, keep=2, before_pointers=lambda: None)
        self.files = self.stored()

    def stored(self) -> dict[str, bytes | None]:
        files = Storage(self._uri).files("checkpoints")
        return {name: Storage(self._uri).read(name) for name in files}


@pytest.mark.parametrize("changes_before", range(7))
def test_driver_that_lost_its_lock_leaves_the_checkpoints_of_its_successor(
    changes_before: int, s3_environment: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The lock is lost between any two changes of a publish; its renewal, which would notice, is an hour away."""
    uri = f"{s3_environment}/run"
    monkeypatch.setenv("PILLSNAP_CACHE_DIR", str(tmp_path / "own"))
    monkeypatch.setattr(mirror, "PUBLISH_EVERY_S", 3600.0)
    monkeypatch.setattr(driver_lock, "RENEW_EVERY_S", 3600.0)
    monkeypatch.setattr(driver_lock, "SETTLE_S", 0.0)
    monkeypatch.setattr(ray, "get", lambda value, timeout=None: value)
    successor = Successor(uri, monkeypatch, tmp_path / "successor")
    done = {"changes": 0, "taking over": 0}

    def watched(method: Callable[..., None]) -> Callable[..., None]:
        def change(storage: Storage, *args: Any) -> None:
            if storage.uri == uri or done["taking over"]:  # the lock, the events, and what the successor writes
                return method(storage, *args)
            method(storage, *args)
            done["changes"] += 1
            take_over_if_due()

        return change

    def take_over_if_due() -> None:
        if done["changes"] == changes_before and not done["taking over"]:
            done["taking over"] = 1
            successor.take_over()

    with pytest.raises(UserError, match="Another driver"), driving(uri, lambda line: None) as folder:
        relay = Relay(uri, str(folder))
        backend = connect("unused", uri, RemoteCalls(relay), task="detection", rank=0)
        with closing(relay), backend.become_writer():
            path = commit(backend, 1)
            for name in ("upload", "write", "remove"):
                monkeypatch.setattr(Storage, name, watched(getattr(Storage, name)))
            take_over_if_due()
            backend.publish(path, best=True, keep=2, announce=lambda: None)
    assert successor.files and successor.stored() == successor.files
    last, damaged = PublishedCheckpoints(uri, "detection", "reader").find()
    assert last is not None and damaged == [] and float(last.weights("model")["w"][0]) == 7.0


def test_only_rank_0_polls_for_a_stop_request(s3_environment: str, relay: Relay) -> None:
    uri, handle = f"{s3_environment}/run", RemoteCalls(relay)
    (scratch(uri, "driver") / STOP_FILE).touch()
    first = connect("unused", uri, handle, task="detection", rank=0)
    second = connect("unused", uri, handle, task="detection", rank=1)
    assert [first.stop_requested() for _ in range(3)] == [False, True, True]  # the first call sends the request
    assert [second.stop_requested() for _ in range(3)] == [False] * 3
