"""Members of ZIP archives as photos and labels: the set arrives zipped, and is read without unpacking.

A *location* is what the reading side gets instead of an image path: the path itself for a plain file, and for a member
`ARCHIVE.zip::OFFSET:LENGTH:COMPRESSION`, so that one read of LENGTH bytes at OFFSET gives the member's data.
"""

from __future__ import annotations

import os
import re
import stat
import struct
import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from pillsnap.errors import UserError

STORED, DEFLATED = 0, 8
MAX_MEMBER_BYTES = 1 << 28
_ARCHIVE_NAME = re.compile(r"([TV])([SL])(_\d+_.+)\.zip", re.IGNORECASE)
_UNPACKED = re.compile(r"[TV][SL]_|K-")
_LOCATION = re.compile(r"(.+\.zip)::(\d+):(\d+):([08])", re.IGNORECASE | re.DOTALL)
_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_ENCRYPTED, _UTF8 = 0x1, 0x800
_MAX_DEPTH = 6
_FULL = 0xFFFFFFFF


class Place(NamedTuple):
    """Where a member's data lies: `archive` relative to the data root, bytes [offset, offset + length) of it."""

    archive: str
    offset: int
    length: int
    compression: int


class Member(NamedTuple):
    """One entry of an archive's directory. `header_offset` is that of its local header, `problem` why it is refused."""

    name: str
    header_offset: int
    length: int
    compression: int
    problem: str = ""


def to_location(place: Place) -> str:
    """The one-string form of a place."""
    return f"{place.archive}::{place.offset}:{place.length}:{place.compression}"


def parse_location(location: str) -> Place | None:
    """Undo `to_location`; None for the path of a plain file."""
    match = _LOCATION.fullmatch(location)
    return Place(match[1], int(match[2]), int(match[3]), int(match[4])) if match else None


def read_place(root: str, place: Place) -> bytes:
    """Data of one member. Raises UserError when it is damaged, too large or the archive is no regular file; OSError."""
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
    """Bytes of a member from the bytes at its place. Raises UserError when they are damaged, or more than `max_bytes`
    (MAX_MEMBER_BYTES) unpacked.
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
    """The first bytes of a deflated member, at most `num_bytes`. Raises UserError when they are damaged."""
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, num_bytes)
    except zlib.error as error:
        raise UserError(f"{to_location(place)}: damaged ({error}); test the archive with `unzip -t`") from error


def locate(root: str, archive: str, members: Sequence[Member]) -> list[Place]:
    """Where the data of members begins, which only their local headers say. Raises UserError for a damaged archive."""
    places = []
    with open(f"{root}/{archive}", "rb") as file:
        size = os.fstat(file.fileno()).st_size
        for member in members:
            header = os.pread(file.fileno(), _LOCAL.size, member.header_offset)
            if len(header) < _LOCAL.size or header[:4] != b"PK\3\4":
                raise UserError(f"{archive}: damaged at byte {member.header_offset}; test it with `unzip -t`")
            name_length, extra_length = _LOCAL.unpack(header)[-2:]
            offset = member.header_offset + _LOCAL.size + name_length + extra_length
            if offset + member.length > size:
                raise UserError(f"{archive}: {member.name} reaches behind the end of the file; download it again")
            places.append(Place(archive, offset, member.length, member.compression))
    return places


def read_directory(path: Path) -> Iterator[Member]:
    """Every file of an archive's central directory, in its order, without an object of zipfile's for each.

    Names are UTF-8 or CP949. Members that must not be read carry a problem: unsafe_member_name, encrypted_member,
    unknown_compression, link. Raises UserError when the file is no ZIP archive or is cut off.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        count, length, start = _find_directory(file.fileno(), size, path)
        directory = os.pread(file.fileno(), length, start)
    position = 0
    for _ in range(count):
        if position + _ENTRY.size > len(directory) or directory[position : position + 4] != b"PK\1\2":
            raise UserError(f"{path}: the ZIP directory is damaged at entry {position}; test it with `unzip -t`")
        entry = _ENTRY.unpack_from(directory, position)
        flags, method = entry[3], entry[4]
        compressed, plain, name_length, extra_length, comment_length = entry[8:13]
        attributes, offset = entry[15], entry[16]
        name_end = position + _ENTRY.size + name_length
        raw = directory[position + _ENTRY.size : name_end]
        if _FULL in (compressed, plain, offset):
            compressed, offset = _wide(directory[name_end : name_end + extra_length], compressed, plain, offset)
        position = name_end + extra_length + comment_length
        if raw[-1:] == b"/":
            continue
        name = _decode(raw, bool(flags & _UTF8))
        yield Member(name, offset, compressed, method, _problem(name, flags, method, attributes))


def find_archives(root: Path) -> dict[str, str | None]:
    """Image archives (`TS_1_단일.zip`) beneath the root with their label archives (`TL_1_단일.zip`), relative, sorted.

    Those of the training set when there are any, otherwise those of the validation set (`VS_`). Directory links are
    followed, each real folder once; unpacked parts (TS_*, TL_*, K-*) are not entered.
    """
    images: dict[tuple[str, str], str] = {}
    labels: dict[tuple[str, str], str] = {}
    for path in _archive_files(root):
        name = unicodedata.normalize("NFC", path.rpartition("/")[2])
        match = _ARCHIVE_NAME.fullmatch(name)
        if match:
            kind = images if match[2].upper() == "S" else labels
            kind.setdefault((match[1].upper(), match[3].lower()), path)
    tree = "T" if any(key[0] == "T" for key in images) else "V"
    return {path: labels.get(key) for key, path in sorted(images.items(), key=lambda item: item[1]) if key[0] == tree}


def _archive_files(root: Path) -> list[str]:
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
                if entry.name.lower().endswith(".zip") and entry.is_file(follow_symlinks=False):
                    found.append(folder + entry.name)
                elif depth < _MAX_DEPTH and not _UNPACKED.match(entry.name) and entry.is_dir():
                    stack.append((f"{folder}{entry.name}/", depth + 1))
    return sorted(found)


def _find_directory(descriptor: int, size: int, path: Path) -> tuple[int, int, int]:
    """(entries, bytes, offset) of the central directory."""
    tail_start = max(0, size - (1 << 16) - _END.size - _END64_LOCATOR.size)
    tail = os.pread(descriptor, size - tail_start, tail_start)
    end = tail.rfind(b"PK\5\6")
    if end < 0 or end + _END.size > len(tail):
        raise UserError(f"{path}: not a ZIP archive, or cut off; download it again")
    count, length, start = _END.unpack_from(tail, end)[4:7]
    locator = end - _END64_LOCATOR.size
    if locator >= 0 and tail[locator : locator + 4] == b"PK\6\7":
        (offset,) = _END64_LOCATOR.unpack_from(tail, locator)[2:3]
        record = os.pread(descriptor, _END64.size, offset)
        if len(record) < _END64.size or record[:4] != b"PK\6\6":
            raise UserError(f"{path}: the ZIP directory is damaged; test it with `unzip -t`")
        count, length, start = _END64.unpack(record)[7:10]
    if start + length > size:
        raise UserError(f"{path}: the ZIP directory lies behind the end of the file; download it again")
    return count, length, start


def _wide(extra: bytes, compressed: int, plain: int, offset: int) -> tuple[int, int]:
    """(compressed size, header offset) of an entry whose 32-bit fields are full: they are in the ZIP64 extra field."""
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        if kind == 1:
            values = [
                value for (value,) in struct.iter_unpack("<Q", extra[position + 4 : position + 4 + length // 8 * 8])
            ]
            wide = iter(values + [0] * 3)
            if plain == _FULL:
                next(wide)
            compressed = next(wide) if compressed == _FULL else compressed
            return compressed, next(wide) if offset == _FULL else offset
        position += 4 + length
    return compressed, offset


def _decode(raw: bytes, is_utf8: bool) -> str:
    for encoding in ("utf-8",) if is_utf8 else ("utf-8", "cp949"):
        try:
            return raw.decode(encoding)
        except UnicodeDecodeError:
            continue
    return raw.decode("latin-1")


def _problem(name: str, flags: int, method: int, attributes: int) -> str:
    if not name or name.startswith("/") or "\\" in name or "\0" in name or ".." in name.split("/"):
        return "unsafe_member_name"
    if stat.S_ISLNK(attributes >> 16):
        return "link"
    if flags & _ENCRYPTED:
        return "encrypted_member"
    return "" if method in (STORED, DEFLATED) else "unknown_compression"
