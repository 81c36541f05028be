"""Folders of any pyarrow file system (s3://…, gs://…, hdfs://…), and where this node keeps its copies of them.

Credentials come from the environment (AWS_*, with AWS_ENDPOINT_URL for a server that is not Amazon's) or from the
machine's own configuration, never from a URI.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from pillsnap.errors import UserError

if TYPE_CHECKING:
    from pyarrow import fs

CACHE_ENV = "PILLSNAP_CACHE_DIR"
_CHUNK_BYTES = 8 << 20
_CONNECT_TIMEOUT_S = 5.0
_KEEP_COPIES_S = 14 * 86_400.0
_ATTEMPTS = 5
"""Of a request that the network refuses: about five seconds in all, half a minute when nobody answers."""
_REPLACE_WHOLE = ("s3", "gcs", "abfs")
"""File systems on which an object appears whole, or not at all, when its stream is closed."""


class StorageError(UserError, OSError):
    """A remote folder that cannot be read or written; the message says which, why and what to look at."""


class Stamp(NamedTuple):
    """What tells two contents of a remote file apart."""

    size: int
    mtime_ns: int


def is_uri(where: str | Path) -> bool:
    """Whether it names a remote folder or file, not a path that this machine mounts."""
    return len(urlsplit(str(where)).scheme) > 1 and "://" in str(where)


def join(where: str, name: str) -> str:
    """The path or URI of something beneath `where`; what follows a URI's question mark stays at its end."""
    if not is_uri(where):
        return f"{where.rstrip('/')}/{name}"
    parts = urlsplit(where)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))


def last_name(uri: str) -> str:
    """The last part of a URI's path."""
    return urlsplit(uri).path.rstrip("/").rpartition("/")[2]


def folder_of(uri: str) -> str:
    """The URI of the folder that holds it."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(path=parts.path.rstrip("/").rpartition("/")[0]))


def plain(where: str) -> str:
    """`file:///a/b` as the path that it is; anything else as it was given."""
    return urlsplit(where).path if where.startswith("file://") else where


def cache_folder() -> Path:
    """This node's folder for copies of what lies elsewhere: PILLSNAP_CACHE_DIR, or one of this user's in the temporary
    folder. Raises UserError when that one belongs to somebody else.
    """
    if os.environ.get(CACHE_ENV):
        return Path(os.environ[CACHE_ENV]).absolute()
    folder = Path(tempfile.gettempdir(), f"pillsnap-{os.getuid()}")
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700, parents=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise UserError(f"{folder} belongs to somebody else: name another folder for copies with {CACHE_ENV}.")
    return folder


def scratch(uri: str, role: str) -> Path:
    """Where this node keeps its copy of a remote folder, for one `role`; its last part is the remote folder's name."""
    return cache_folder() / role / hashlib.sha256(uri.encode()).hexdigest()[:16] / last_name(uri)


def drop_old_copies(role: str) -> None:
    """Delete this node's copies of remote folders in which nothing was written for two weeks."""
    oldest_s = time.time() - _KEEP_COPIES_S
    for copy in (cache_folder() / role).glob("*"):
        with contextlib.suppress(FileNotFoundError):  # somebody works there this moment
            if max(path.lstat().st_mtime for path in (copy, *copy.rglob("*"))) < oldest_s:
                shutil.rmtree(copy, ignore_errors=True)


def local_manifest(where: str | Path) -> Path:
    """A manifest that this machine can open: itself, or a copy of the remote one with classes.json beside it."""
    if not is_uri(where):
        return Path(where)
    uri = str(where)
    folder, name = (folder_of(uri), last_name(uri)) if uri.endswith(".parquet") else (uri, "manifest.parquet")
    storage, local = Storage(folder), scratch(folder, "manifests")
    if not storage.download(name, local / name):
        raise UserError(f"{join(folder, name)}: no such manifest; make one with `pillsnap manifest build`.")
    if not storage.download("classes.json", local / "classes.json"):
        (local / "classes.json").unlink(missing_ok=True)
    return local / name


def check_uri(uri: str) -> None:
    """Raise UserError for a URI without a bucket or host, or with a key in it, which would end up in logs."""
    parts = urlsplit(uri)
    options = dict(parse_qsl(parts.query))
    if parts.username or parts.password or {"access_key", "secret_key", "session_token"} & set(options):
        raise UserError(
            f"The URI {parts.scheme}://…{parts.path} holds credentials, which logs would show: "
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead."
        )
    if not parts.netloc and not parts.path.strip("/"):
        raise UserError(f"{uri!r} names no bucket: give something like s3://bucket/folder.")


def file_system(uri: str) -> tuple[fs.FileSystem, str]:
    """The pyarrow file system of a URI, made once a process, and the path on it. Raises UserError for one that cannot
    be used.
    """
    check_uri(uri)
    parts = urlsplit(uri)
    endpoint = os.environ.get("AWS_ENDPOINT_URL", "")  # of another server, another file system
    base = _file_system(urlunsplit(parts._replace(path="" if parts.netloc else parts.path)), endpoint)
    return base, (parts.netloc + parts.path if parts.scheme == "s3" else _path_of(uri)).rstrip("/")


@lru_cache(maxsize=1024)
def _path_of(uri: str) -> str:
    from pyarrow import fs

    return fs.FileSystem.from_uri(uri)[1]


@lru_cache(maxsize=64)
def _file_system(uri: str, _endpoint: str) -> fs.FileSystem:
    import pyarrow as pa
    from pyarrow import fs

    parts = urlsplit(uri)
    try:
        found, _ = fs.FileSystem.from_uri(uri)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise StorageError(f"{uri} cannot be used ({one_line(error)}): look at its name, rights and network.") from None
    if parts.scheme != "s3":
        return found
    options = dict(parse_qsl(parts.query))
    endpoint = urlsplit(options.get("endpoint_override") or _endpoint)
    override = endpoint.netloc or endpoint.path
    scheme = endpoint.scheme if endpoint.netloc else options.get("scheme", "https")
    return fs.S3FileSystem(
        region=found.region,
        endpoint_override=override or None,
        scheme=scheme,
        connect_timeout=_CONNECT_TIMEOUT_S,
        allow_delayed_open=True,  # a small object is one request, which writes all of it or nothing
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS),
    )


def one_line(error: BaseException) -> str:
    """An error's text without line breaks and request numbers."""
    text = " ".join(str(error).split())
    return text.partition(" (Request ID")[0][:300]


class Storage:
    """The files beneath a URI; a file is replaced whole. Every error is a StorageError that names the URI."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._files, self._base = file_system(uri)
        self._whole = self._files.type_name in _REPLACE_WHOLE

    def __reduce__(self) -> tuple[type[Storage], tuple[str]]:
        return Storage, (self.uri,)

    def read(self, name: str, offset: int = 0) -> bytes | None:
        """A file's bytes from `offset` on; None when it is not there."""
        with self._errors(name):
            try:
                if not offset:
                    with self._files.open_input_stream(self._path(name)) as stream:
                        return stream.read()
                with self._files.open_input_file(self._path(name)) as file:
                    file.seek(offset)
                    return file.read()
            except FileNotFoundError:
                return None

    def write(self, name: str, data: bytes) -> None:
        """Replace a file's content."""
        with self._errors(name), self._replacing(name) as path, self._files.open_output_stream(path) as stream:
            stream.write(data)

    def upload(self, source: Path, name: str) -> None:
        """Replace a file's content by that of a local file."""
        with (
            source.open("rb") as file,
            self._errors(name),
            self._replacing(name) as path,
            self._files.open_output_stream(path) as stream,
        ):
            while chunk := file.read(_CHUNK_BYTES):
                stream.write(chunk)

    def download(self, name: str, target: Path) -> bool:
        """Replace a local file by a copy of this one, at once or not at all; False when there is none."""
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
        try:
            with self._errors(name):
                try:
                    with self._files.open_input_stream(self._path(name)) as stream, partial.open("wb") as file:
                        while chunk := stream.read(_CHUNK_BYTES):
                            file.write(chunk)
                except FileNotFoundError:
                    return False
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
        return True

    def files(self, folder: str = "") -> dict[str, Stamp]:
        """Every file beneath a folder, by its name relative to this storage; empty when there is no such folder."""
        from pyarrow import fs

        with self._errors(folder):
            selector = fs.FileSelector(self._path(folder), recursive=True, allow_not_found=True)
            found = [info for info in self._files.get_file_info(selector) if info.is_file]
        return {info.path[len(self._base) + 1 :]: Stamp(info.size, info.mtime_ns) for info in found}

    def stamp(self, name: str) -> Stamp | None:
        """Size and time of a file; None when it is not there."""
        with self._errors(name):
            info = self._files.get_file_info(self._path(name))
        return Stamp(info.size, info.mtime_ns) if info.is_file else None

    def remove(self, name: str) -> None:
        """Delete a file, if it is there."""
        with self._errors(name), contextlib.suppress(FileNotFoundError):
            self._files.delete_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._base}/{name}" if name else self._base

    @contextmanager
    def _replacing(self, name: str) -> Iterator[str]:
        """Where to write so that the file is replaced whole: a file system of files needs a second name."""
        path = self._path(name)
        if self._whole:
            yield path
            return
        folder, _, base = path.rpartition("/")
        self._files.create_dir(folder, recursive=True)
        partial = f"{folder}/.{base}.{uuid.uuid4().hex[:8]}.partial"
        yield partial
        self._files.move(partial, path)

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        import pyarrow as pa

        try:
            yield
        except StorageError:
            raise
        except (OSError, pa.ArrowException) as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise  # this node's disk
            where = join(self.uri, name) if name else self.uri
            raise StorageError(
                f"{where} cannot be reached ({one_line(error)}): look at the bucket's name, its rights and the network."
            ) from None
