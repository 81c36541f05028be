"""Lock of a remote run: one driver per run, over all machines that reach its storage.

Object stores have no locks. A driver writes a lock file, waits, and continues when the file is still its own; then it
renews the file every few seconds. A lock file is stale when it has not changed for DEAD_AFTER_S by this machine's
clock, or when its process on this machine has ended. A driver that was suspended for longer finds out at its next
renewal only, so whatever it publishes is preceded by `check_not_lost`, which reads the lock file itself.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pillsnap.errors import UserError
from pillsnap.processes import machine, start_of
from pillsnap.runs.directory import CONFIG_FILE, STOP_FILE
from pillsnap.runs.mirror import RunMirror
from pillsnap.storage import Storage, StorageError, drop_old_copies, is_uri, scratch

LOCK_FILE = ".driver.lock"
_LOST_FILE = ".lost"
_ID_FILE = ".driver-id"
"""In the driver's copy of the run: the id in its lock file."""
RENEW_EVERY_S = 10.0
DEAD_AFTER_S = 35.0
SETTLE_S = 1.0

_log = logging.getLogger(__name__)


class DriverLock:
    """Holds a run's storage for this process from `acquire` to `release`.

    `on_lost` is called from a thread when another driver has taken the lock, for example after this machine slept.
    """

    def __init__(self, uri: str, say: Callable[[str], None], on_lost: Callable[[], None]) -> None:
        self._storage, self._say, self._on_lost = Storage(uri), say, on_lost
        self.id = uuid.uuid4().hex
        self._owner: dict[str, Any] = {"id": self.id, "host": socket.gethostname(), **_this_process()}
        self._renewals = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="driver-lock", daemon=True)
        self.lost = False

    def acquire(self) -> None:
        """Raises UserError when another driver is alive, StorageError when the storage cannot be read and written."""
        self._wait_until_stale()
        self._write()
        time.sleep(SETTLE_S)
        other = _read(self._storage)
        if other is not None and other["id"] != self.id:
            raise self._held(other)
        self._thread.start()

    def release(self) -> None:
        """Remove the lock file, unless it is another driver's."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        if not self.lost and not _is_taken(self._storage, self.id):
            self._storage.remove(LOCK_FILE)

    def _wait_until_stale(self) -> None:
        first = _read(self._storage)
        if first is None:
            return
        if first.get("machine") == machine():
            if start_of(int(first["pid"])) == first.get("started"):
                raise self._held(first)
            return
        self._say(
            f"process {first['pid']} on {first['host']} may be training in {self._storage.uri}: waiting up to "
            f"{DEAD_AFTER_S:.0f} s for a sign of life"
        )
        end_s = time.monotonic() + DEAD_AFTER_S
        while time.monotonic() < end_s:
            time.sleep(SETTLE_S)
            now = _read(self._storage)
            if now is None:
                return
            if now != first:
                raise self._held(now)

    def _held(self, owner: dict[str, Any]) -> UserError:
        return UserError(
            f"Process {owner['pid']} on {owner['host']} is training in {self._storage.uri}: wait for it, end it, or "
            "use another --run."
        )

    def _write(self) -> None:
        self._storage.write(LOCK_FILE, json.dumps(self._owner | {"renewals": self._renewals}).encode())

    def _renew(self) -> None:
        warned = False
        while not self._stop.wait(RENEW_EVERY_S):
            try:
                if _is_taken(self._storage, self.id):
                    self.lost = True
                    self._on_lost()
                    return
                self._renewals += 1
                self._write()
                warned = False
            except StorageError as error:  # retried; the next unpublished checkpoint ends the run
                if not warned:
                    _log.warning("the run's lock could not be renewed: %s", error)
                warned = True


def _read(storage: Storage) -> dict[str, Any] | None:
    try:
        owner = json.loads(storage.read(LOCK_FILE) or b"null")
    except ValueError:
        return None
    return owner if isinstance(owner, dict) and {"id", "pid", "host"} <= set(owner) else None


def _is_taken(storage: Storage, own_id: str) -> bool:
    """Whether another driver holds the run, or has held it and ended: a run without any lock, rather than no run."""
    owner = _read(storage)
    return storage.stamp(CONFIG_FILE) is not None if owner is None else owner["id"] != own_id


def _this_process() -> dict[str, Any]:
    pid = os.getpid()
    return {"pid": pid, "started": start_of(pid), "machine": machine()}


@contextmanager
def driving(where: str, say: Callable[[str], None]) -> Iterator[Path]:
    """The folder to train or evaluate a run in. For a remote run it is this node's copy, fetched at the start and
    published at the end, with the run's lock held.

    Raises UserError when another driver is alive, StorageError when the storage cannot be read and written.
    """
    if not is_uri(where):
        yield Path(where)
        return
    drop_old_copies("driver")
    local = scratch(where, "driver")
    local.mkdir(parents=True, exist_ok=True)
    (local / _LOST_FILE).unlink(missing_ok=True)

    def give_up() -> None:
        for name in (_LOST_FILE, STOP_FILE):
            (local / name).write_text("the run was taken by another driver")

    lock = DriverLock(where, say, give_up)
    lock.acquire()
    (local / _ID_FILE).write_text(lock.id)
    mirror = RunMirror(where, local)
    try:
        mirror.fetch()
        try:
            yield local
        except BaseException:
            try:
                check_not_lost(where, local)
                mirror.publish()
            except UserError as error:
                say(f"the end of the run was not published: {error}")
            raise
        check_not_lost(where, local)
        mirror.publish()
    finally:
        with contextlib.suppress(StorageError):
            lock.release()


def check_not_lost(uri: str, run_dir: Path) -> None:
    """Raise UserError when the run's lock is not that of this copy's driver, StorageError when it cannot be read."""
    known = run_dir / _ID_FILE
    if (run_dir / _LOST_FILE).exists() or (known.exists() and _is_taken(Storage(uri), known.read_text())):
        raise UserError(
            f"Another driver has taken over the run {run_dir.name}, or its {LOCK_FILE} was deleted: this one publishes "
            "nothing more."
        )
