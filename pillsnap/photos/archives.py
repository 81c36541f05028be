"""Photos and labels that are members of ZIP archives, read without unpacking the archives.

A *location* names the bytes of a photo: the path of a plain file, or `ARCHIVE.zip::OFFSET:LENGTH:COMPRESSION` for a
member, so that reading LENGTH bytes at OFFSET gives the member's data.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import struct
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from pillsnap.errors import UserError
from pillsnap.storage import one_line

STORED, DEFLATED = 0, 8
MAX_MEMBER_BYTES = 1 << 28
_ARCHIVE_NAME = re.compile(r"([TV])([SL])(_\d+_.+)\.zip", re.IGNORECASE)
_PIECE = re.compile(r"(.+\.zip)\.part\d+", re.IGNORECASE)
_UNPACKED = re.compile(r"K-")
_LOCATION = re.compile(r"(.+\.zip)::(\d+):(\d+):([08])", re.IGNORECASE | re.DOTALL)
_LOCAL = struct.Struct("<4s5H3L2H")
_ENCRYPTED, _UTF8 = 0x1, 0x800
_MAX_DEPTH = 6


class Place(NamedTuple):
    """Byte range of a member: bytes [offset, offset + length) of `archive`, which is relative to the data root."""

    archive: str
    offset: int
    length: int
    compression: int


class Member(NamedTuple):
    """Entry of an archive's directory. `header_offset`: of its local header; `problem`: why it is refused."""

    name: str
    header_offset: int
    length: int
    compression: int
    problem: str = ""


def to_location(place: Place) -> str:
    """The location of a place, as one string."""
    return f"{place.archive}::{place.offset}:{place.length}:{place.compression}"


def parse_location(location: str) -> Place | None:
    """Inverse of `to_location`; None for the path of a plain file."""
    match = _LOCATION.fullmatch(location)
    return Place(match[1], int(match[2]), int(match[3]), int(match[4])) if match else None


def read_place(root: str, place: Place) -> bytes:
    """Data of one member. Raises OSError, or UserError when it is damaged, too large or not in a regular file."""
    descriptor = os.open(f"{root}/{place.archive}", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise UserError(f"{place.archive} is not a regular file")
        if place.length > MAX_MEMBER_BYTES:
            raise UserError(f"{to_location(place)}: more than {MAX_MEMBER_BYTES} bytes")
        data = os.pread(descriptor, place.length, place.offset)
    finally:
        os.close(descriptor)
    return unpack(data, place)


def unpack(data: bytes, place: Place, max_bytes: int | None = None) -> bytes:
    """Uncompressed bytes of a member. Raises UserError when they are damaged or more than `max_bytes` (default:
    MAX_MEMBER_BYTES).
    """
    max_bytes = MAX_MEMBER_BYTES if max_bytes is None else max_bytes
    if len(data) != place.length:
        raise UserError(f"{to_location(place)}: the archive ends before the member does; is the download complete?")
    if place.compression == STORED:
        return data
    try:
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        plain = inflater.decompress(data, max_bytes)
    except zlib.error as error:
        raise UserError(f"{to_location(place)}: damaged ({error}); test the archive with `unzip -t`") from error
    if inflater.unconsumed_tail or not inflater.eof:
        raise UserError(f"{to_location(place)}: damaged, or more than {max_bytes} bytes unpacked")
    return plain


def unpack_start(data: bytes, place: Place, num_bytes: int) -> bytes:
    """At most `num_bytes` uncompressed bytes from the start of a deflated member. Raises UserError when damaged."""
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, num_bytes)
    except zlib.error as error:
        raise UserError(f"{to_location(place)}: damaged ({error}); test the archive with `unzip -t`") from error


def locate(root: str, archive: str, members: Sequence[Member]) -> list[Place]:
    """Where the data of each member begins: after its local header. Raises UserError for a damaged archive."""
    places = []
    with open(f"{root}/{archive}", "rb") as file:
        size = os.fstat(file.fileno()).st_size
        for member in members:
            is_inside = 0 <= member.header_offset <= size - _LOCAL.size
            header = os.pread(file.fileno(), _LOCAL.size, member.header_offset) if is_inside else b""
            if header[:4] != b"PK\3\4":
                raise UserError(f"{archive}: damaged at byte {member.header_offset}; test it with `unzip -t`")
            name_length, extra_length = _LOCAL.unpack(header)[-2:]
            offset = member.header_offset + _LOCAL.size + name_length + extra_length
            if offset + member.length > size:
                raise UserError(f"{archive}: {member.name} ends after the end of the file; download it again")
            places.append(Place(archive, offset, member.length, member.compression))
    return places


def read_directory(path: Path) -> Iterator[Member]:
    """Every file of an archive, in the order of its directory. Names are UTF-8 or CP949.

    Members that must not be read have a problem: unsafe_member_name, encrypted_member, unknown_compression or link.
    Raises UserError when the file is no ZIP archive, or is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError, ValueError, struct.error) as error:
        raise UserError(
            f"{path}: not a ZIP archive, or cut off ({one_line(error)}); download it again, or test it with `unzip -t`"
        ) from error
    for entry in entries:
        if not entry.orig_filename.endswith("/"):
            name = _name(entry)
            yield Member(name, entry.header_offset, entry.compress_size, entry.compress_type, _problem(name, entry))


def find_archives(root: Path) -> dict[str, str | None]:
    """Image archives (`TS_1_단일.zip`) under `root` with their label archives (`TL_1_단일.zip`), relative, sorted.

    Archives of the training set, or of the validation set (`VS_`) if there are none. Links to folders are followed,
    each real folder once; unpacked folders (K-*) are skipped.
    """
    images: dict[tuple[str, str], str] = {}
    labels: dict[tuple[str, str], str] = {}
    for path in _files(root, lambda name: name.lower().endswith(".zip")):
        key = archive_key(path)
        if key:
            (images if key[1] == "S" else labels).setdefault((key[0], key[2]), path)
    tree = "T" if any(key[0] == "T" for key in images) else "V"
    return {path: labels.get(key) for key, path in sorted(images.items(), key=lambda item: item[1]) if key[0] == tree}


def archive_key(path: str) -> tuple[str, str, str] | None:
    """(T or V, S or L, rest of the name) of an archive of AI Hub: `TS_1_단일.zip` -> (T, S, _1_단일)."""
    match = _ARCHIVE_NAME.fullmatch(unicodedata.normalize("NFC", path.rpartition("/")[2]))
    return (match[1].upper(), match[2].upper(), match[3].lower()) if match else None


def find_pieces(root: Path) -> dict[str, int]:
    """Archives that are still in pieces (`NAME.zip.part0`, `NAME.zip.part1073741824`): path and number of pieces."""
    pieces = _files(root, lambda name: _PIECE.fullmatch(name) is not None)
    return dict(sorted(Counter(piece[: piece.lower().rindex(".part")] for piece in pieces).items()))


def join_command(archive: str) -> str:
    """A shell command that joins the pieces of an archive, in the order of their numbers."""
    return f"ls -v '{archive}'.part* | xargs -d '\\n' cat > '{archive}'"


def _files(root: Path, wanted: Callable[[str], bool]) -> list[str]:
    found: list[str] = []
    seen: set[tuple[int, int]] = set()
    stack = [("", 0)]
    while stack:
        folder, depth = stack.pop()
        info = (root / folder).stat()
        if (info.st_dev, info.st_ino) in seen:
            continue
        seen.add((info.st_dev, info.st_ino))
        with os.scandir(root / folder) as entries:
            for entry in entries:
                if wanted(entry.name) and entry.is_file(follow_symlinks=False):
                    found.append(folder + entry.name)
                elif depth < _MAX_DEPTH and not _UNPACKED.match(entry.name) and entry.is_dir():
                    stack.append((f"{folder}{entry.name}/", depth + 1))
    return sorted(found)


def _name(entry: zipfile.ZipInfo) -> str:
    """The member's name: zipfile reads names without the UTF-8 flag as CP437."""
    if entry.flag_bits & _UTF8:
        return entry.orig_filename
    raw = entry.orig_filename.encode("cp437")
    for encoding in ("utf-8", "cp949"):
        with contextlib.suppress(UnicodeDecodeError):
            return raw.decode(encoding)
    return raw.decode("latin-1")


def _problem(name: str, entry: zipfile.ZipInfo) -> str:
    if not name or name.startswith("/") or "\\" in name or "\0" in name or ".." in name.split("/"):
        return "unsafe_member_name"
    if stat.S_ISLNK(entry.external_attr >> 16):
        return "link"
    if entry.flag_bits & _ENCRYPTED:
        return "encrypted_member"
    return "" if entry.compress_type in (STORED, DEFLATED) else "unknown_compression"
