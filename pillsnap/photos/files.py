"""Bytes of the photos of a manifest, read only from under one data root.

Links are followed only for folders of the levels that are commonly kept on other disks (_LINKED_FOLDERS) or that stay
under the root. A photo that is a link, a FIFO or a folder is refused, and so is a path that leaves the root.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

from pillsnap.errors import UserError
from pillsnap.photos.archives import MAX_MEMBER_BYTES, STORED, Place, parse_location, unpack, unpack_start
from pillsnap.photos.decode import DEFAULT_MAX_PIXELS, BadImage, check_pixels, other_format, read_header
from pillsnap.storage import file_system, is_uri, one_line

MAX_PHOTO_BYTES = MAX_MEMBER_BYTES
_HEADER_BYTES = 1 << 20
"""Maximum offset of a photo's header: in a JPEG it may follow a colour profile or thumbnail."""
_BYTES_PER_PIXEL, _METADATA_BYTES = 8, 16 << 20
"""Upper bound of a photo's size: four uncompressed 16-bit channels, and metadata."""
_LINKED_FOLDERS = re.compile(r"data|train|val|valid|test|images|labels|single|combination|[TV][SL]_.*")


class PhotoStore:
    """Reads photos by their location (see archives.py), relative to a local folder or a pyarrow file system's URI."""

    def __init__(self, root: str | Path, max_pixels: int = DEFAULT_MAX_PIXELS) -> None:
        self.root = str(root)
        self.max_pixels = max_pixels

    def read(self, location: str) -> bytes:
        """Bytes of one photo. Raises BadImage, whose reason is one of: outside_root, missing, link, not_a_file,
        unreadable_file, too_large, truncated, corrupt; for a deflated member also those of decode.read_header.
        """
        place = parse_location(location)
        path = location if place is None else place.archive
        if place is not None and place.length > MAX_PHOTO_BYTES:
            raise BadImage("too_large", f"{place.length} bytes")
        if is_uri(self.root):
            data = self._read_remote(path, None if place is None else (place.offset, place.length))
        else:
            descriptor = open_photo(self.root, path)
            try:
                size = os.fstat(descriptor).st_size if place is None else place.length
                if size > MAX_PHOTO_BYTES:
                    raise BadImage("too_large", f"{size} bytes")
                data = _read(descriptor, size, 0 if place is None else place.offset)
            except OSError as error:
                raise BadImage("unreadable_file", os.strerror(error.errno or 0)) from None
            finally:
                os.close(descriptor)
        if place is None:
            return data
        if len(data) < place.length:
            raise BadImage("truncated", "the archive ends before the photo does")
        try:
            return unpack(data, place, self._max_bytes(data, place))
        except BadImage:
            raise
        except UserError as error:
            raise BadImage("corrupt", str(error)) from None

    def _max_bytes(self, data: bytes, place: Place) -> int:
        """Maximum uncompressed size of a photo, derived from its header: refuses a bomb before it is inflated."""
        if place.compression == STORED:
            return place.length
        start = unpack_start(data, place, _HEADER_BYTES)
        if not start:  # empty or damaged: `unpack` raises
            return _METADATA_BYTES
        if other_format(start):
            return MAX_PHOTO_BYTES  # its header needs the whole photo
        header = read_header(start)
        check_pixels(header, self.max_pixels)
        return min(MAX_PHOTO_BYTES, header.width * header.height * _BYTES_PER_PIXEL + _METADATA_BYTES)

    def _read_remote(self, path: str, part: tuple[int, int] | None) -> bytes:
        check_path(path)
        try:
            files, base = file_system(self.root)
            with files.open_input_file(f"{base}/{path}") as file:
                offset, length = part or (0, file.size())
                if length > MAX_PHOTO_BYTES:
                    raise BadImage("too_large", f"{length} bytes")
                file.seek(offset)
                return file.read(length)
        except FileNotFoundError:
            raise BadImage("missing", f"{path} is not there") from None
        except OSError as error:
            raise BadImage("unreadable_file", one_line(error)) from None


class PhotoFile:
    """An open local or remote file of photos; a context manager."""

    def __init__(self, size: int, read: Callable[[int, int], bytes], close: Callable[[], None]) -> None:
        self.size = size
        self.read = read
        """(number of bytes, offset) -> at most that many bytes. Raises OSError."""
        self.close = close

    def __enter__(self) -> PhotoFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_file(root: str, path: str) -> PhotoFile:
    """The regular file `path` under `root`, a folder or a URI. Raises BadImage as `open_photo` does."""
    if not is_uri(root):
        descriptor = open_photo(root, path)
        size = os.fstat(descriptor).st_size
        return PhotoFile(size, partial(os.pread, descriptor), partial(os.close, descriptor))
    check_path(path)
    try:
        files, base = file_system(root)
        remote = files.open_input_file(f"{base}/{path}")
        return PhotoFile(remote.size(), remote.read_at, remote.close)
    except FileNotFoundError:
        raise BadImage("missing", f"{path} is not there") from None
    except OSError as error:
        raise BadImage("unreadable_file", one_line(error)) from None


def open_photo(root: str, path: str) -> int:
    """A descriptor of the regular file `path` under `root`, for reading.

    Raises BadImage: outside_root, missing, link, not_a_file or unreadable_file.
    """
    check_path(path)
    problem = folder_problem(root, path.rpartition("/")[0])
    if problem:
        raise BadImage(problem, f"{path} is not in a folder beneath the data root")
    try:
        # O_NONBLOCK: opening a FIFO would otherwise block until a writer comes.
        descriptor = os.open(f"{root}/{path}", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise BadImage("missing", f"{path} is not there") from None
    except OSError as error:
        # ELOOP: a link. ENXIO: a socket.
        kind = {errno.ELOOP: "link", errno.ENXIO: "not_a_file"}.get(error.errno or 0, "unreadable_file")
        raise BadImage(kind, os.strerror(error.errno or 0)) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BadImage("not_a_file", f"{path} is not a regular file")
    return descriptor


def check_path(path: str) -> None:
    """Raise BadImage (outside_root) unless the path stays under its root by name: relative, no `..`, no NUL."""
    try:
        check_relative(path)
    except UserError as error:
        raise BadImage("outside_root", str(error)) from None


def check_relative(image_path: str) -> None:
    """Raise UserError unless the path stays under its root by name: relative, no `..`, no NUL."""
    outside = not image_path or image_path[0] == "/" or "\0" in image_path or "\\" in image_path
    if outside or ".." in image_path.split("/"):
        raise UserError(f"The manifest names {image_path!r}, which is not a path beneath the data root.")


def _read(descriptor: int, size: int, offset: int) -> bytes:
    """`size` bytes, or fewer at the end of the file: one pread may return less than requested."""
    data = os.pread(descriptor, size, offset)
    while len(data) < size and (more := os.pread(descriptor, size - len(data), offset + len(data))):
        data += more
    return data


@lru_cache(maxsize=65_536)
def folder_problem(root: str, folder: str) -> str:
    """Why photos in this folder must not be read, or "". See the module's docstring for links; a link to a folder above
    itself is a loop.
    """
    path = root
    for part in folder.split("/") if folder else []:
        parent, path = path, f"{path}/{part}"
        try:
            mode = os.lstat(path).st_mode
        except OSError:
            return "missing"
        if stat.S_ISLNK(mode):
            target = os.path.realpath(path)
            if _is_inside(os.path.realpath(parent), target):
                return "link"
            if not _LINKED_FOLDERS.fullmatch(part) and not _is_inside(target, os.path.realpath(root)):
                return "outside_root"
    return ""


def _is_inside(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder
