"""An index of every file under a data root, made by one walk: nothing in the folder is overlooked."""

from __future__ import annotations

import os
import re
import unicodedata
from pathlib import Path
from urllib.parse import unquote

from pillsnap.errors import UserError
from pillsnap.manifest.import_report import Problems
from pillsnap.manifest.table import has_control_characters
from pillsnap.photos.decode import PHOTO_SUFFIXES
from pillsnap.photos.files import folder_problem

_NO_DATA = re.compile(r"(readme|licen[cs]e).*|.*\.(yaml|yml|cache)|classes\.txt|notes\.json|obj\.(names|data)", re.I)
"""Files of labelling tools and descriptions of a set."""


class Folder:
    """Files under `root` by folder. Links to files, and to folders that training would refuse, are reported."""

    def __init__(self, root: Path, problems: Problems) -> None:
        """Walk the tree. Raises UserError for a missing folder."""
        self.root = Path(root)
        self.problems = problems
        self.files: dict[str, list[str]] = {}
        """File names by folder, both sorted; the root is ""."""
        self._used: set[str] = set()
        self._spellings: dict[str, dict[str, list[str]]] = {}
        if not self.root.is_dir():
            raise UserError(f"{root}: no such folder")
        self._walk()
        self.photos = [path for path in self.paths() if is_photo(path)]

    def paths(self) -> list[str]:
        """Paths of all files, relative to the root, sorted by folder."""
        return [f"{folder}/{name}" if folder else name for folder, names in self.files.items() for name in names]

    def has(self, path: str) -> bool:
        """Whether a regular file is there."""
        folder, _, name = path.rpartition("/")
        return name in self._names(folder)

    def use(self, path: str) -> None:
        """Mark a file as read: it is not reported as left out."""
        self._used.add(path)

    def find(self, folder: str, stem: str, suffix: str) -> tuple[str, bool]:
        """(path of the file `stem` + `suffix` in `folder`, or ""; whether its name is written in another way).

        Other ways: the suffix in capitals, another Unicode form, percent-encoding. Raises UserError when two files fit.
        """
        exact = stem + suffix
        if exact in self._names(folder):
            return _join(folder, exact), False
        spelled = self._spelled(folder)
        found = spelled.get(_key(exact)) or spelled.get(_key(unquote(exact)), [])
        if len(found) > 1:
            raise UserError(f"{self.root / folder}: {found[0]!r} and {found[1]!r} both fit {exact!r}: remove one")
        return (_join(folder, found[0]), True) if found else ("", False)

    def unused(self) -> list[str]:
        """Files that are neither photos, marked as read, nor of a name that says that they are no data."""
        return [
            path
            for path in self.paths()
            if path not in self._used and not is_photo(path) and not _NO_DATA.fullmatch(path.rpartition("/")[2])
        ]

    def _names(self, folder: str) -> dict[str, None]:
        return self._sets.get(folder, {})

    def _spelled(self, folder: str) -> dict[str, list[str]]:
        if folder not in self._spellings:
            spelled: dict[str, list[str]] = {}
            for name in self.files.get(folder, ()):
                for key in dict.fromkeys((_key(name), _key(unquote(name)))):
                    spelled.setdefault(key, []).append(name)
            self._spellings[folder] = spelled
        return self._spellings[folder]

    def _walk(self) -> None:
        seen: set[tuple[int, int]] = set()
        found: dict[str, list[str]] = {}
        stack = [""]
        while stack:
            folder = stack.pop()
            info = os.stat(self.root / folder)
            if (info.st_dev, info.st_ino) in seen:
                self.problems.add("folder_seen_twice", folder)
                continue
            seen.add((info.st_dev, info.st_ino))
            found[folder] = []
            with os.scandir(self.root / folder) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    self._sort_in(entry, folder, found[folder], stack)
        self.files = dict(sorted(found.items()))
        self._sets = {folder: dict.fromkeys(names) for folder, names in self.files.items()}

    def _sort_in(self, entry: os.DirEntry[str], folder: str, names: list[str], stack: list[str]) -> None:
        path = _join(folder, entry.name)
        if has_control_characters(entry.name):
            self.problems.add("unreadable_name", path)
        elif entry.is_file(follow_symlinks=False):
            names.append(entry.name)
        elif not entry.is_dir() or (entry.is_symlink() and folder_problem(str(self.root), path)):
            self.problems.add("link_or_not_a_file", path)
        else:
            stack.append(path)


def is_photo(path: str) -> bool:
    """Whether a file is taken for a photo, by its ending; its content is checked when it is read."""
    name = path.rpartition("/")[2]
    return name.lower().endswith(PHOTO_SUFFIXES) and name[0] != "."


def stem_of(path: str) -> str:
    """File name without folders and ending."""
    return path.rpartition("/")[2].rpartition(".")[0]


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _key(name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    return f"{unicodedata.normalize('NFC', stem)}.{suffix.lower()}"
