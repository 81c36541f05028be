"""Files of a store: in a local folder, or on any pyarrow file system with a cache on this node's disk."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from pathlib import Path
from typing import Any, Protocol

from pillsnap.files import write_atomically
from pillsnap.storage import file_system, is_uri, scratch

PREFIX, SUFFIX = "windows-", ".arrow"
_DIGITS = 20
_LIST_EVERY_S = 10.0


def shard_name(data: Any) -> str:
    """A shard's name, derived from its bytes."""
    return f"{PREFIX}{hashlib.sha256(data).hexdigest()[:_DIGITS]}{SUFFIX}"


def is_shard(name: str) -> bool:
    """Whether the name is that of a complete shard."""
    return name.startswith(PREFIX) and name.endswith(SUFFIX)


class ShardFolder(Protocol):
    """The files of one store. Errors are OSError."""

    def names(self) -> list[str] | None:
        """Names of the complete shards, sorted; None when unchanged since the last call."""
        ...

    def local(self, name: str) -> Path:
        """Local file with the shard's content."""
        ...

    def write(self, name: str, data: Any) -> None:
        """Write a file atomically."""
        ...

    def sizes(self) -> dict[str, int]:
        """Bytes of each complete shard."""
        ...

    def remove(self, name: str | None = None) -> None:
        """Delete one shard, or the whole store."""
        ...


def shard_folder(folder: str) -> ShardFolder:
    """The files of a store in a local folder or under a URI."""
    return RemoteFolder(folder) if is_uri(folder) else LocalFolder(folder)


class LocalFolder:
    """A folder in a mounted file system."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        self._changed_ns = -1

    def names(self) -> list[str] | None:
        try:
            changed_ns = os.stat(self._folder).st_mtime_ns
        except FileNotFoundError:
            return []
        if changed_ns == self._changed_ns:
            return None
        self._changed_ns = changed_ns
        return sorted(filter(is_shard, os.listdir(self._folder)))

    def local(self, name: str) -> Path:
        return self._folder / name

    def write(self, name: str, data: Any) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self._folder / name, data)

    def sizes(self) -> dict[str, int]:
        return {path.name: path.stat().st_size for path in self._folder.glob(f"{PREFIX}*{SUFFIX}")}

    def remove(self, name: str | None = None) -> None:
        if name is None:
            shutil.rmtree(self._folder, ignore_errors=True)
        else:
            (self._folder / name).unlink(missing_ok=True)


class RemoteFolder:
    """A folder under a URI such as s3://bucket/path; each shard is copied to this node once and verified."""

    def __init__(self, uri: str) -> None:
        self._filesystem, self._base = file_system(uri)
        self._cache = scratch(uri, "shards")
        self._listed_s = float("-inf")

    def names(self) -> list[str] | None:
        if time.monotonic() - self._listed_s < _LIST_EVERY_S:
            return None
        self._listed_s = time.monotonic()
        return sorted(self.sizes())

    def local(self, name: str) -> Path:
        cached = self._cache / name
        if not cached.exists():
            self._cache.mkdir(parents=True, exist_ok=True)
            with self._filesystem.open_input_stream(f"{self._base}/{name}") as stream:
                data = stream.read()
            if shard_name(data) != name:
                raise OSError(f"its content does not match its name, on {self._filesystem.type_name}")
            write_atomically(cached, data)
        return cached

    def write(self, name: str, data: Any) -> None:
        self._filesystem.create_dir(self._base, recursive=True)
        with self._filesystem.open_output_stream(f"{self._base}/{name}") as stream:
            stream.write(data)
        self._listed_s = float("-inf")

    def sizes(self) -> dict[str, int]:
        from pyarrow import fs

        found = self._filesystem.get_file_info(fs.FileSelector(self._base, allow_not_found=True))
        return {info.base_name: info.size for info in found if info.is_file and is_shard(info.base_name)}

    def remove(self, name: str | None = None) -> None:
        from pyarrow import fs

        if name is not None:
            self._filesystem.delete_file(f"{self._base}/{name}")
            (self._cache / name).unlink(missing_ok=True)
            return
        shutil.rmtree(self._cache, ignore_errors=True)
        if self._filesystem.get_file_info(self._base).type != fs.FileType.NotFound:
            self._filesystem.delete_dir(self._base)
