"""Lists every photo of an AI Hub tree, unpacked or in ZIP archives, without opening photos.

The depth of the layout is fixed, so link loops end. Directory links are followed down to the TS_* level (parts of the
set may be on other disks); below it, links and everything but regular files are refused and counted.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pillsnap.errors import UserError
from pillsnap.manifest.aihub import CODES, EXTENSIONS, view_fields
from pillsnap.manifest.delivery import Delivery, find_delivery, tree_of
from pillsnap.manifest.table import has_control_characters
from pillsnap.observe.work_progress import Progress, unseen
from pillsnap.photos.archives import Member, archive_key, find_archives, find_pieces, join_command, read_directory

_OFFICIAL_SET = re.compile(r"(data/)?(train|val)/images/")
_EXAMPLE = "K-000114_0_2_0_0_75_260_200.png"


@dataclass
class Refused:
    """Entries of the tree that are not photos: counts and first examples by reason."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, path: str, limit: int = 20) -> None:
        """Count one entry; bytes that are not UTF-8 are written as escapes."""
        path = path.encode("utf-8", "backslashreplace").decode()
        self.counts[reason] = self.counts.get(reason, 0) + 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < limit:
            examples.append(path)

    def merge(self, other: Refused) -> None:
        """Add the counts and examples of another scan."""
        for reason, count in other.counts.items():
            self.counts[reason] = self.counts.get(reason, 0) + count
            self.examples[reason] = sorted(self.examples.get(reason, []) + other.examples[reason])[:20]


@dataclass
class Scan:
    """All photos of a tree, eight bytes each: photo i has set `set_index[i]` and view `view_index[i]`.

    A set is one (folder, codes) pair; a view is the rest of the file name. `view_fields` is int16, shape (views, 7), in
    the order of table.CAMERA_FIELDS. Photos are sorted by folder, then by name, unpacked ones first.
    """

    folders: list[str]
    """Folder per set, relative to the data root; in an archive: archive path and folder in it."""
    prefixes: list[str]
    """Codes part of the file names, per set."""
    archive_of_set: list[str | None]
    views: list[str]
    view_fields: np.ndarray
    set_index: np.ndarray
    view_index: np.ndarray
    members: np.ndarray | None
    """int64, shape (photos, 3): header offset, length, compression in the archive; None without archives."""
    label_archives: dict[str, str | None]
    """Label archive by image archive."""
    refused: Refused
    delivery: Delivery
    """Folders outside the official tree; their labels are found by it."""
    pieces: dict[str, int] = field(default_factory=dict)
    """Archives that are still in pieces, which are not read."""

    def __len__(self) -> int:
        return len(self.set_index)

    def stem(self, photo: int) -> str:
        """File name without extension."""
        return self.prefixes[self.set_index[photo]] + self.views[self.view_index[photo]].rpartition(".")[0]

    def path(self, photo: int) -> str:
        """POSIX path relative to the data root."""
        index = self.set_index[photo]
        return f"{self.folders[index]}/{self.prefixes[index]}{self.views[self.view_index[photo]]}"

    def member(self, photo: int) -> Member | None:
        """The archive member of a photo; None for an unpacked one."""
        if self.members is None or self.archive_of_set[self.set_index[photo]] is None:
            return None
        offset, length, compression = self.members[photo].tolist()
        return Member(self.path(photo), offset, length, compression)

    def tree(self, index: int) -> str:
        """`train` or `val`: the AI Hub tree of a set."""
        return "train" if _is_training(self.archive_of_set[index] or self.folders[index]) else "val"

    def is_delivered(self, index: int) -> bool:
        """Whether a set is in plain folders outside the official tree."""
        return self.archive_of_set[index] is None and not _OFFICIAL_SET.match(self.folders[index])


def scan(data_root: Path, *, num_threads: int = 4, progress: Progress = unseen) -> Scan:
    """List every photo of an AI Hub tree; only those of the training tree if there is one.

    Raises UserError for a missing root, another layout, a tree without photos and a damaged archive.
    """
    root = Path(data_root)
    if not root.is_dir():
        raise UserError(f"{root}: the data root is not a folder; set --data-root or PILLSNAP_DATA_ROOT")
    try:
        archives, pieces = find_archives(root), find_pieces(root)
        parts, delivery = find_parts(root), find_delivery(root)
        folders = [*(f"{above}/{name}" for above, name in delivery.leaves), *delivery.flat]
        if any(_is_training(path) for path in [*parts, *archives, *folders]):
            parts = [path for path in parts if _is_training(path)]
            archives = {path: labels for path, labels in archives.items() if _is_training(path)}
            delivery.leaves = [leaf for leaf in delivery.leaves if _is_training("/".join(leaf))]
            delivery.flat = [folder for folder in delivery.flat if _is_training(folder)]
        _check_pieces(root, pieces, archives)
        if not parts and not archives and not delivery.leaves and not delivery.flat:
            raise UserError(
                f"{root}: no AI Hub photos; expected train/images/single/TS_* (or data/train/…), TS_*.zip, or folders "
                f"of photos named like {_EXAMPLE} under it"
            )
        result = _scan(root, parts, archives, delivery, num_threads, progress)
        result.pieces = pieces
        return result
    except PermissionError as error:
        raise UserError(f"{error.filename}: permission denied; give this user the right to read it") from error


def _check_pieces(root: Path, pieces: dict[str, int], archives: dict[str, str | None]) -> None:
    """Raise UserError where nothing but pieces is there, or the labels of an archive are in pieces."""
    lacking = {(key[0], "L", key[2]) for path, labels in archives.items() if not labels and (key := archive_key(path))}
    named = [path for path in pieces if archive_key(path) in lacking] or ([] if archives else list(pieces))
    if named:
        verb = "are" if len(named) > 1 else "is"
        more = f" and {len(named) - 1} more" if len(named) > 1 else ""
        raise UserError(
            f"{root}: {named[0]}{more} {verb} still in pieces ({pieces[named[0]]} files .part…); "
            f"join each, in its folder: {join_command(named[0].rpartition('/')[2])}"
        )


def _scan(
    root: Path,
    parts: list[str],
    archives: dict[str, str | None],
    delivery: Delivery,
    num_threads: int,
    progress: Progress,
) -> Scan:
    builder = _ScanBuilder()
    total = len(parts) + len(archives)
    with ThreadPoolExecutor(max_workers=num_threads) as pool:
        listings = pool.map(lambda part: _list_part(os.fspath(root), part), parts)
        for done, (part, (folders, refused)) in enumerate(zip(parts, listings, strict=True), start=1):
            builder.refused.merge(refused)
            for name, files in folders:
                builder.add_folder(f"{part}/{name}", name, files)
            progress("scan", done, total)
    for above, name in delivery.leaves:
        path = f"{above}/{name}" if above else name
        builder.add_folder(path, name, _list_folder(f"{root}/{path}", path, builder.refused))
    for folder in delivery.flat:
        builder.add_folder(folder, "", _list_images(f"{root}/{folder}", folder, builder.refused))
    for stray in delivery.strays:
        builder.refused.add("stray_image", stray)
    for done, archive in enumerate(archives, start=len(parts) + 1):
        _add_archive(builder, root, archive)
        progress("scan", done, total)
    result = builder.finish(archives, delivery)
    if not len(result):
        raise UserError(f"{root}: {total} TS_* folders or archives, but no photo named like {_EXAMPLE}")
    return result


def _is_training(path: str) -> bool:
    """Whether a part (`[data/]train/images/…`), an archive (`TS_*.zip`) or a folder belongs to the training set."""
    if path.lower().endswith(".zip"):
        return path.rpartition("/")[2][0].upper() == "T"
    if _OFFICIAL_SET.match(path):
        return path.split("/images/")[0].rpartition("/")[2] == "train"
    return tree_of(path) == "train"


def find_parts(root: Path) -> list[str]:
    """TS_* folders, relative to the root, sorted."""
    parts = []
    for base in ("train", "val", "data/train", "data/val"):
        for kind in ("single", "combination"):
            images = root / base / "images" / kind
            if images.is_dir():
                names = [entry.name for entry in os.scandir(images) if entry.is_dir()]
                parts += [f"{base}/images/{kind}/{name}" for name in names]
    return sorted(parts)


def _list_part(root: str, part: str) -> tuple[list[tuple[str, list[str]]], Refused]:
    refused = Refused()
    folders: list[tuple[str, list[str]]] = []
    with os.scandir(f"{root}/{part}") as entries:
        leaves = sorted(entries, key=lambda entry: entry.name)
    for leaf in leaves:
        if leaf.is_dir(follow_symlinks=False):
            folders.append((leaf.name, _list_folder(leaf.path, f"{part}/{leaf.name}", refused)))
        elif leaf.is_symlink():
            refused.add("link", f"{part}/{leaf.name}")
    return folders, refused


def _list_folder(path: str, relative: str, refused: Refused) -> list[str]:
    with os.scandir(path) as entries:
        listed = list(entries)
    names = [entry.name for entry in listed if entry.is_file(follow_symlinks=False)]
    if len(names) != len(listed):
        for entry in listed:
            if entry.is_symlink():
                refused.add("link", f"{relative}/{entry.name}")
            elif not entry.is_file(follow_symlinks=False):
                refused.add("not_a_file", f"{relative}/{entry.name}")
    names.sort()
    return names


def _list_images(path: str, relative: str, refused: Refused) -> list[str]:
    """Files of a folder that may hold folders, too."""
    with os.scandir(path) as entries:
        listed = sorted((entry for entry in entries if not entry.is_dir()), key=lambda entry: entry.name)
    for entry in listed:
        if not entry.is_file(follow_symlinks=False):
            refused.add("link" if entry.is_symlink() else "not_a_file", f"{relative}/{entry.name}")
    return [entry.name for entry in listed if entry.is_file(follow_symlinks=False)]


def _add_archive(builder: _ScanBuilder, root: Path, archive: str) -> None:
    folders: dict[str, list[Member]] = {}
    for member in read_directory(root / archive):
        if member.problem:
            builder.refused.add(member.problem, f"{archive}/{member.name}")
        else:
            folders.setdefault(member.name.rpartition("/")[0], []).append(member)
    for folder, members in sorted(folders.items()):
        members.sort(key=lambda member: member.name)
        names = [member.name.rpartition("/")[2] for member in members]
        path = f"{archive}/{folder}" if folder else archive
        builder.add_folder(path, folder.rpartition("/")[2], names, archive, members)


class _ScanBuilder:
    def __init__(self) -> None:
        self.refused = Refused()
        self._folders: list[str] = []
        self._prefixes: list[str] = []
        self._archives: list[str | None] = []
        self._views: dict[str, int] = {}
        self._fields: list[tuple[int, ...]] = []
        self._view_index: list[np.ndarray] = []
        self._members: list[np.ndarray] = []

    def add_folder(
        self,
        folder: str,
        expected_prefix: str,
        names: Sequence[str],
        archive: str | None = None,
        members: Sequence[Member] = (),
    ) -> None:
        """Add one folder's sorted file names; count those that are not photos. Most begin with `expected_prefix`."""
        if has_control_characters(folder):
            self.refused.add("unreadable_name", folder)
            return
        cut = len(expected_prefix)
        views = self._views
        by_prefix: dict[str, tuple[list[int], list[int]]] = {}
        if CODES.fullmatch(expected_prefix):
            by_prefix[expected_prefix] = ([], [])
        for position, name in enumerate(names):
            view = views.get(name[cut:]) if name.startswith(expected_prefix) else None
            prefix = expected_prefix
            if view is None or prefix not in by_prefix:
                parsed = self._parse(folder, name)
                if parsed is None:
                    continue
                prefix, view = parsed
                by_prefix.setdefault(prefix, ([], []))
            by_prefix[prefix][0].append(view)
            by_prefix[prefix][1].append(position)
        for prefix, (indices, positions) in by_prefix.items():
            if indices:
                self._folders.append(folder)
                self._prefixes.append(prefix)
                self._archives.append(archive)
                self._view_index.append(np.array(indices, dtype=np.int32))
                if members:
                    chosen = [members[position] for position in positions]
                    self._members.append(np.array([member[1:4] for member in chosen], dtype=np.int64))

    def finish(self, label_archives: dict[str, str | None], delivery: Delivery) -> Scan:
        """The scan of all added folders; unpacked ones must have been added before archives."""
        sizes = [len(indices) for indices in self._view_index]
        num_photos = sum(sizes)
        members = None
        if self._members:
            zipped = np.concatenate(self._members)
            members = np.concatenate([np.zeros((num_photos - len(zipped), 3), dtype=np.int64), zipped])
        return Scan(
            folders=self._folders,
            prefixes=self._prefixes,
            archive_of_set=self._archives,
            views=list(self._views),
            view_fields=np.array(self._fields, dtype=np.int16).reshape(-1, 7),
            set_index=np.repeat(np.arange(len(sizes), dtype=np.int32), sizes),
            view_index=np.concatenate(self._view_index) if sizes else np.zeros(0, dtype=np.int32),
            members=members,
            label_archives=label_archives,
            refused=self.refused,
            delivery=delivery,
        )

    def _parse(self, folder: str, name: str) -> tuple[str, int] | None:
        stem, _, extension = name.rpartition(".")
        if f".{extension.lower()}" not in EXTENSIONS:
            self.refused.add("other_file", f"{folder}/{name}")
            return None
        prefix, _, rest = stem.partition("_")
        fields = view_fields("_" + rest)
        if fields is None or not CODES.fullmatch(prefix):
            self.refused.add("stray_image", f"{folder}/{name}")
            return None
        view = name[len(prefix) :]
        if view not in self._views:
            self._views[view] = len(self._fields)
            self._fields.append(fields)
        return prefix, self._views[view]
