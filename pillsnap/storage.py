"""Remote folders on any pyarrow file system (s3://…, gs://…, hdfs://…), and the local cache of their copies.

Credentials come from the environment (AWS_*; AWS_ENDPOINT_URL for other S3 servers) or from the machine's
configuration, never from a URI.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from pillsnap.caches import cache_folder
from pillsnap.errors import UserError

if TYPE_CHECKING:
    from pyarrow import fs

_CHUNK_BYTES = 8 << 20
_CONNECT_TIMEOUT_S = 5.0
_KEEP_COPIES_S = 14 * 86_400.0
_ATTEMPTS = 5
"""Attempts per request: about 5 s in total when the connection is refused, 30 s when there is no answer."""
_REPLACE_WHOLE = ("s3", "gcs", "abfs")
"""File systems on which an object appears only complete, when its stream is closed."""


class StorageError(UserError, OSError):
    """A remote folder that cannot be read or written; the message names it, the reason and what to check."""


class Stamp(NamedTuple):
    """Identifies the content of a remote file."""

    size: int
    mtime_ns: int


def is_uri(where: str | Path) -> bool:
    """Whether `where` is a URI rather than a local path."""
    return len(urlsplit(str(where)).scheme) > 1 and "://" in str(where)


def join(where: str, name: str) -> str:
    """`where`/`name` of a path or URI; the query of a URI stays at its end."""
    if not is_uri(where):
        return f"{where.rstrip('/')}/{name}"
    parts = urlsplit(where)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))


def last_name(uri: str) -> str:
    """Last part of the path of a URI."""
    return urlsplit(uri).path.rstrip("/").rpartition("/")[2]


def folder_of(uri: str) -> str:
    """URI of the parent folder."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(path=parts.path.rstrip("/").rpartition("/")[0]))


def plain(where: str) -> str:
    """The path of a file:// URI; anything else unchanged."""
    return urlsplit(where).path if where.startswith("file://") else where


def scratch(uri: str, role: str) -> Path:
    """Local folder for a copy of a remote folder, separate per `role`; it has the remote folder's name."""
    return cache_folder() / role / hashlib.sha256(uri.encode()).hexdigest()[:16] / last_name(uri)


def drop_old_copies(role: str) -> None:
    """Delete local copies of remote folders that were not written to for two weeks."""
    oldest_s = time.time() - _KEEP_COPIES_S
    for copy in (cache_folder() / role).glob("*"):
        with contextlib.suppress(FileNotFoundError):  # in use by another process
            if max(path.lstat().st_mtime for path in (copy, *copy.rglob("*"))) < oldest_s:
                shutil.rmtree(copy, ignore_errors=True)


def local_manifest(where: str | Path) -> Path:
    """Local path of a manifest; a remote one is downloaded with its classes.json."""
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
    """Raise UserError for a URI without a bucket or host, or with credentials, which logs would contain."""
    parts = urlsplit(uri)
    options = dict(parse_qsl(parts.query))
    if parts.username or parts.password or {"access_key", "secret_key", "session_token"} & set(options):
        raise UserError(
            f"The URI {parts.scheme}://…{parts.path} contains credentials, which would appear in logs: "
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead."
        )
    if not parts.netloc and not parts.path.strip("/"):
        raise UserError(f"{uri!r} names no bucket: use the form s3://bucket/folder.")


def file_system(uri: str) -> tuple[fs.FileSystem, str]:
    """The pyarrow file system of a URI (created once per process) and the path on it. Raises UserError for an invalid
    URI.
    """
    check_uri(uri)
    parts = urlsplit(uri)
    endpoint = os.environ.get("AWS_ENDPOINT_URL", "")  # part of the cache key
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
        raise StorageError(f"{uri} cannot be used ({one_line(error)}): check its name, rights and network.") from None
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
        allow_delayed_open=True,  # a small object is written by one atomic request
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS),
    )


def one_line(error: BaseException) -> str:
    """An error's text without line breaks and request numbers."""
    text = " ".join(str(error).split())
    return text.partition(" (Request ID")[0][:300]


class Storage:
    """The files under a URI, replaced atomically. Errors are StorageErrors that name the URI."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._files, self._base = file_system(uri)
        self._whole = self._files.type_name in _REPLACE_WHOLE

    def __reduce__(self) -> tuple[type[Storage], tuple[str]]:
        return Storage, (self.uri,)

    def read(self, name: str, offset: int = 0) -> bytes | None:
        """Bytes of a file from `offset`; None when it does not exist."""
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
        """Replace a file's content with that of a local file."""
        with (
            source.open("rb") as file,
            self._errors(name),
            self._replacing(name) as path,
            self._files.open_output_stream(path) as stream,
        ):
            while chunk := file.read(_CHUNK_BYTES):
                stream.write(chunk)

    def download(self, name: str, target: Path) -> bool:
        """Download a file, replacing `target` atomically; False when it does not exist."""
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
        """All files under a folder by name relative to this storage; empty when the folder does not exist."""
        from pyarrow import fs

        with self._errors(folder):
            selector = fs.FileSelector(self._path(folder), recursive=True, allow_not_found=True)
            found = [info for info in self._files.get_file_info(selector) if info.is_file]
        return {info.path[len(self._base) + 1 :]: Stamp(info.size, info.mtime_ns) for info in found}

    def stamp(self, name: str) -> Stamp | None:
        """Size and modification time of a file; None when it does not exist."""
        with self._errors(name):
            info = self._files.get_file_info(self._path(name))
        return Stamp(info.size, info.mtime_ns) if info.is_file else None

    def remove(self, name: str) -> None:
        """Delete a file if it exists."""
        with self._errors(name), contextlib.suppress(FileNotFoundError):
            self._files.delete_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._base}/{name}" if name else self._base

    @contextmanager
    def _replacing(self, name: str) -> Iterator[str]:
        """The path to write to, so that `name` is replaced atomically: a temporary name, unless objects are atomic."""
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
                raise  # the local disk
            where = join(self.uri, name) if name else self.uri
            raise StorageError(
                f"{where} cannot be reached ({one_line(error)}): check the bucket, its permissions and the network."
            ) from None
