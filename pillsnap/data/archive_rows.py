"""What zipped photos add to the rows of a manifest: the place of each photo and of its labels."""

from __future__ import annotations

import os
import unicodedata
from functools import lru_cache
from pathlib import Path

from pillsnap.data.aihub import label_folder, label_names, label_paths, split_codes
from pillsnap.data.archives import Member, locate, read_directory, to_location
from pillsnap.data.scan import Scan


def archive_columns(scan: Scan, positions: list[int], root: str) -> dict[str, list]:
    """The columns archive, member, offset, length, compression for photos of a scan; empty when none is zipped."""
    if scan.members is None:
        return {}
    names = ("archive", "member", "offset", "length", "compression")
    columns: dict[str, list] = {name: [None] * len(positions) for name in names}
    by_archive: dict[str, list[tuple[int, Member]]] = {}
    for row, position in enumerate(positions):
        member = scan.member(position)
        if member is not None:
            archive = scan.archive_of_set[scan.set_index[position]]
            by_archive.setdefault(str(archive), []).append((row, member))
    for archive, entries in by_archive.items():
        places = locate(root, archive, [member for _, member in entries])
        for (row, member), place in zip(entries, places, strict=True):
            values = (archive, member.name[len(archive) + 1 :], place.offset, place.length, place.compression)
            for name, value in zip(names, values, strict=True):
                columns[name][row] = value
    return columns


def label_jobs(scan: Scan, positions: list[int], root: str) -> tuple[list[str], list[tuple[str, str]]]:
    """(readable label paths, (location, code) jobs) of photos, code by code; an empty location is a missing label."""
    paths: list[str] = []
    jobs: list[tuple[str, str]] = []
    zipped: dict[str, dict[str, list[int]]] = {}
    for position in positions:
        index = scan.set_index[position]
        prefix, stem = scan.prefixes[index], scan.stem(position)
        archive = scan.archive_of_set[index]
        codes = split_codes(prefix)
        if archive is None:
            found = label_paths(scan.folders[index], prefix, stem)
            if not scan.folders[index].isascii():
                base = label_folder(scan.folders[index])
                found = [_as_on_disk(root, base) + path[len(base) :] for path in found]
            jobs += zip(found, codes, strict=True)
        else:
            label_archive = scan.label_archives[archive]
            leaf = scan.folders[index].rpartition("/")[2]
            names = [f"{leaf}_json/{name}" for name in label_names(prefix, stem)]
            found = [f"{label_archive or archive}/{name}" for name in names]
            for name, code in zip(names, codes, strict=True):
                if label_archive is not None:
                    zipped.setdefault(label_archive, {}).setdefault(_tail(name), []).append(len(jobs))
                jobs.append(("", code))
        paths += found
    for label_archive, wanted in zipped.items():
        members = [entry for entry in read_directory(Path(root, label_archive)) if _tail(entry.name) in wanted]
        for member, place in zip(members, locate(root, label_archive, members), strict=True):
            if not member.problem:
                for job in wanted[_tail(member.name)]:
                    jobs[job] = (to_location(place), jobs[job][1])
    return paths, jobs


@lru_cache(maxsize=4096)
def _as_on_disk(root: str, folder: str) -> str:
    """The folder in the Unicode form in which it exists: images and labels may have been unpacked on two systems."""
    forms = (folder, unicodedata.normalize("NFC", folder), unicodedata.normalize("NFD", folder))
    return next((form for form in forms if os.path.isdir(f"{root}/{form}")), folder)


def _tail(name: str) -> str:
    """Folder and name: archives differ in what they put above it."""
    return "/".join(name.rsplit("/", 2)[-2:])
