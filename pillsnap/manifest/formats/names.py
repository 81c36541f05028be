"""Class names as text: from a data.yaml, a text file or a list, without type guessing. A class's code is its name
without outer blanks, with `-` for `|`, which separates codes in CSV cells.
"""

from __future__ import annotations

import contextlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pillsnap.errors import UserError
from pillsnap.manifest.table import CODE_SEPARATOR, check_code

_SPLIT_KEYS = {"train": "train", "val": "val", "validation": "val", "valid": "val", "test": "test"}
"""In any case: CVAT writes the names of its subsets."""
_FILE_ENDINGS = (".yaml", ".yml", ".txt", ".names", ".json", ".csv", ".data", ".xml")


@dataclass(frozen=True)
class DataYaml:
    """Contents of a data.yaml, all as written. `splits`: entries by split, empty where the file names none."""

    file: Path
    path: str
    names: list[str]
    splits: dict[str, list[str]]
    has_key_points: bool


class _TextLoader(yaml.BaseLoader):
    """Scalars stay text: 0123, 12:30, yes and null are names. Keys that occur twice are errors."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} occurs twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_names(names: Path | Sequence[str] | str) -> list[str]:
    """Class names in index order, from a data.yaml, a text file with one name per line, a list, or `a,b,c`.

    Raises UserError for a file that does not exist, keys that are not 0 to n-1, and names that give one code.
    """
    if isinstance(names, str):
        if not is_names_file(names):
            return _checked(names.split(","), "--names")
        names = Path(names)
    if not isinstance(names, Path):
        return _checked(list(names), "--names")
    if names.suffix.lower() in (".yaml", ".yml"):
        return read_data_yaml(names).names
    lines = [line.strip() for line in _read_text(names).rstrip().splitlines()]
    if "" in lines:
        raise UserError(f"{names}: line {lines.index('') + 1} is empty, so class {lines.index('')} has no name")
    return _checked(lines, str(names))


def is_names_file(names: str) -> bool:
    """Whether the value of --names is a file. Raises UserError where it looks like one that does not exist."""
    if Path(names).is_file():
        return True
    looks_like_path = names.lower().endswith(_FILE_ENDINGS) or ("," not in names and re.search(r"[/\\]", names))
    if looks_like_path:
        raise UserError(f"--names {names}: no such file; give the path of a data.yaml or text file, or a list a,b,c")
    return False


def read_data_yaml(file: Path) -> DataYaml:
    """Read a data.yaml as ultralytics does, but all scalars as text. Raises UserError."""
    try:
        document: Any = yaml.load(_read_text(file), Loader=_TextLoader)
    except yaml.YAMLError as error:
        raise UserError(f"{file}: not valid YAML ({' '.join(str(error).split())})") from error
    document = document if isinstance(document, dict) else {}
    listed = document.get("names")
    if isinstance(listed, dict):
        listed = _by_index(listed, str(file))
    if not isinstance(listed, list) or not listed:
        raise UserError(f"{file}: has no `names` list; add one or pass --names as a list")
    if not all(isinstance(name, str) for name in listed):
        raise UserError(f"{file}: an entry of `names` is not text")
    count = document.get("nc", "")
    if count and not (re.fullmatch(r"\d+(\.0*)?", str(count)) and int(float(count)) == len(listed)):
        raise UserError(f"{file}: `nc` is {count}, but `names` has {len(listed)} classes: correct one of them")
    splits: dict[str, list[str]] = {}
    for key in (key for split in _SPLIT_KEYS for key in document if key.lower() == split):
        split, entry = _SPLIT_KEYS[key.lower()], document[key] or []
        entries = [entry] if isinstance(entry, str) else entry
        if not isinstance(entries, list) or not all(isinstance(one, str) and one for one in entries):
            raise UserError(f"{file}: `{key}` is neither a path nor a list of paths")
        if entries:
            splits.setdefault(split, []).extend(entries)
    path = document.get("path") or ""
    names = _checked(listed, str(file))
    return DataYaml(file, path if isinstance(path, str) else "", names, splits, bool(document.get("kpt_shape")))


def find_data_yaml(folder: Path) -> DataYaml | None:
    """The only YAML file in `folder` that has class names, or None. Raises UserError when there are several."""
    found = []
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() in (".yaml", ".yml") and file.is_file():
            with contextlib.suppress(yaml.YAMLError, UserError):  # a file of something else
                document = yaml.load(_read_text(file), Loader=yaml.BaseLoader)
                if isinstance(document, dict) and "names" in document:
                    found.append(file)
    if len(found) > 1:
        raise UserError(f"{folder}: {found[0].name} and {found[1].name} both name classes: say which by --names")
    return read_data_yaml(found[0]) if found else None


def codes_of(names: Sequence[str], where: str = "--names") -> dict[str, str]:
    """Class codes by name. Raises UserError when two names give one code, or look alike in two Unicode forms."""
    codes: dict[str, str] = {}
    seen: dict[str, str] = {}
    for name in names:
        code = name.strip().replace(CODE_SEPARATOR, "-")
        check_code(code, where)
        other = seen.setdefault(unicodedata.normalize("NFC", code), name)
        if other != name:
            raise UserError(f"{where}: the classes {other!r} and {name!r} cannot be told apart: rename one")
        codes[name] = code
    return codes


def _by_index(listed: dict, where: str) -> list:
    if not all(isinstance(key, str) and re.fullmatch(r"\d+", key) for key in listed):
        raise UserError(f"{where}: the keys of `names` are not 0 to {len(listed) - 1}")
    by_index = {int(key): name for key, name in listed.items()}
    if sorted(by_index) != list(range(len(listed))):
        first = min(by_index)
        hint = f"; they begin at {first}, but label files count from 0" if first else ""
        raise UserError(f"{where}: the keys of `names` are not 0 to {len(listed) - 1}{hint}")
    return [by_index[index] for index in range(len(by_index))]


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"{file}: cannot read class names: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot read class names ({error.__class__.__name__}); give a UTF-8 file") from error


def _checked(names: Sequence[str], where: str) -> list[str]:
    names = [str(name).strip() for name in names]
    if not names:
        raise UserError(f"{where}: no class names")
    if len(set(names)) != len(names):
        raise UserError(f"{where}: class names must differ, got {list(names)}")
    codes_of(names, where)
    return list(names)
