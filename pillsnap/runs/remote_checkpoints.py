"""Publishes and fetches the checkpoints of a remote run.

A checkpoint is committed on the node of rank 0 (checkpoint.py), then uploaded: `meta.json` after the other files, the
pointers last, so that a published pointer always names a complete checkpoint. The published pointers are authoritative;
a checkpoint that was committed but not published is dropped.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from pillsnap.runs.checkpoint import (
    CHECKPOINT_FILES,
    META_FILE,
    POINTERS,
    Checkpoint,
    CheckpointError,
    age,
    find_checkpoint,
    is_checkpoint_name,
    load_checkpoint,
    moved_pointers,
    newest_sound,
    outdated,
    point_to,
    pointed_by,
)
from pillsnap.storage import Storage, is_uri, join, scratch

ROLES = ("driver", "worker", "reader")
"""Processes that keep separate copies on a node: the driver, the train workers, all others."""


def find_run_checkpoint(
    where: str | Path, task: str, pointer: str = "last", role: str = "reader"
) -> tuple[Checkpoint | None, list[str]]:
    """As `find_checkpoint`, for a run in a folder or under a URI; a remote checkpoint is copied to this node first.

    `role` selects the copy (storage.scratch). Raises StorageError when the storage cannot be reached.
    """
    if not is_uri(where):
        return find_checkpoint(Path(where) / "checkpoints" / task, pointer)
    return PublishedCheckpoints(str(where), task, role).find(pointer)


class PublishedCheckpoints:
    """The checkpoints of one task in a run's storage, and this node's copies in `folder`."""

    def __init__(self, uri: str, task: str, role: str) -> None:
        self.uri = join(uri, f"checkpoints/{task}")
        self.folder = scratch(uri, role) / "checkpoints" / task
        self._others = [scratch(uri, other) / "checkpoints" / task for other in ROLES if other != role]
        self._storage = Storage(self.uri)

    def find(self, pointer: str = "last") -> tuple[Checkpoint | None, list[str]]:
        """The checkpoint that the published pointer names, else the newest sound one; one message per damaged file."""
        pointed = self._storage.read(f"{pointer}.json")
        names = self._complete()
        found, damaged = newest_sound(
            names,
            None if pointed is None else pointed.decode(errors="replace"),
            join(self.uri, f"{pointer}.json"),
            self.fetch,
        )
        self._drop_all_but(names)
        if found is not None:
            point_to(self.folder, pointer, found.path.name)
        return found, damaged

    def take_over(self) -> None:
        """Make this node's folder equal to the published state. The caller must hold its writer lock."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._drop_all_but(self._complete())
        for pointer in POINTERS:
            content = self._storage.read(f"{pointer}.json")
            (self.folder / f"{pointer}.json").unlink(missing_ok=True)
            if content is not None:
                (self.folder / f"{pointer}.json").write_bytes(content)

    def publish(
        self,
        path: Path,
        *,
        best: bool,
        keep: int,
        branch: bool = False,
        before_pointers: Callable[[], None],
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Upload a committed checkpoint, move its pointers, and delete all but the last `keep` and those they name.

        `before_pointers` is called before the checkpoint becomes complete; when it raises, the previous checkpoint
        stays in place. `check` is called before each change of the storage, and raises when the run is no longer this
        writer's. Raises StorageError likewise.
        """
        for name in CHECKPOINT_FILES:
            check()
            self._storage.upload(path / name, f"{path.name}/{name}")
        before_pointers()
        check()
        self._storage.upload(path / META_FILE, f"{path.name}/{META_FILE}")
        for pointer, name in moved_pointers(path.parent, path.name, best=best, branch=branch).items():
            check()
            self._storage.write(f"{pointer}.json", json.dumps({"checkpoint": name}).encode())
        check()
        self._prune(keep)

    def return_to_branch(self) -> None:
        """As checkpoint.return_to_branch, for the published checkpoints."""
        best, branch = (self._storage.read(f"{pointer}.json") for pointer in ("branch-best", "branch"))
        assert branch is not None
        if best is None:
            self._storage.remove("best.json")
        else:
            self._storage.write("best.json", best)
        self._storage.write("last.json", branch)
        self._delete_all_but(self._pointed(), self._storage.files())

    def _drop_all_but(self, names: list[str]) -> None:
        """Delete this node's copies of checkpoints that are not among `names`."""
        for path in self.folder.glob("step-*"):
            if path.name not in names:
                shutil.rmtree(path)

    def _prune(self, keep: int) -> None:
        files, pointed = self._storage.files(), self._pointed()
        complete = self._complete(files)
        self._delete_all_but(pointed | {*complete} - {*outdated(complete, pointed, keep)}, files)

    def _pointed(self) -> set[str | None]:
        """What the published pointers name, None for a damaged one."""
        contents = [self._storage.read(f"{pointer}.json") for pointer in POINTERS]
        return {pointed_by(content) for content in contents if content is not None}

    def _delete_all_but(self, kept: set[str | None], files: Iterable[str]) -> None:
        gone = [name for name in files if "/" in name and name.partition("/")[0] not in kept]
        for name in sorted(
            gone, key=lambda name: not name.endswith(META_FILE)
        ):  # first, so that the rest is incomplete
            self._storage.remove(name)

    def _complete(self, files: dict | None = None) -> list[str]:
        """Names of completely uploaded checkpoints, newest first."""
        names = self._storage.files() if files is None else files
        found = {name.partition("/")[0] for name in names if name.endswith(f"/{META_FILE}")}
        return sorted(filter(is_checkpoint_name, found), key=age, reverse=True)

    def fetch(self, name: str) -> Checkpoint:
        """This node's verified copy of a checkpoint. Raises CheckpointError naming the remote file at fault."""
        if not is_checkpoint_name(name):
            raise CheckpointError(f"{self.uri} has no checkpoint {name!r}.")
        target, partial = self.folder / name, self.folder / f".{name}.fetching"
        with self._fetching():
            shutil.rmtree(partial, ignore_errors=True)
            meta = self._storage.read(f"{name}/{META_FILE}")
            for folder in (self.folder, *self._others):  # a damaged copy is fetched again
                with contextlib.suppress(OSError, CheckpointError):
                    if (folder / name / META_FILE).read_bytes() == meta:
                        checkpoint = load_checkpoint(folder / name)
                        if folder != self.folder:
                            shutil.copytree(folder / name, partial, copy_function=os.link)
                            shutil.rmtree(target, ignore_errors=True)
                            partial.rename(target)
                        return replace(checkpoint, path=target)
            try:
                for file in (*CHECKPOINT_FILES, META_FILE):
                    if not self._storage.download(f"{name}/{file}", partial / file):
                        raise CheckpointError(f"{join(self.uri, f'{name}/{file}')} is missing.")
                try:
                    checkpoint = load_checkpoint(partial)
                except CheckpointError as error:
                    raise CheckpointError(str(error).replace(str(partial), join(self.uri, name))) from None
                shutil.rmtree(target, ignore_errors=True)
                partial.rename(target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
            return replace(checkpoint, path=target)

    @contextmanager
    def _fetching(self) -> Iterator[None]:
        """Exclude other processes of this node that fetch to the same folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".fetch.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
