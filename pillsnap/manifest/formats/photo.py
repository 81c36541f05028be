"""The form between a label format and the manifest: readers yield labelled photos, writers take them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from pillsnap.errors import UserError

Box = tuple[float, float, float, float]
"""x, y, w, h in pixels of the upright photo."""


@dataclass
class LabelledPhoto:
    """One photo and its labels. `names` and `boxes` have one entry per pill; a box is None where it is not known."""

    path: str
    """POSIX path relative to the data root."""
    width: int
    height: int
    names: list[str] = field(default_factory=list)
    boxes: list[Box | None] = field(default_factory=list)
    split: str = ""
    """train, val or test; empty while unknown."""
    source: str = ""
    group: str = ""
    """Photos of one group stay in one split; empty: the photo is its own group."""


@dataclass
class ReadFolder:
    """What a reader found in a folder."""

    photos: list[LabelledPhoto]
    names: list[str]
    """Class names, also those without a photo."""
    splits: dict[str, str] = field(default_factory=dict)
    """Split of every photo found, also of those left out."""
    notes: list[str] = field(default_factory=list)
    """Where classes and splits were taken from."""


def group_namer(group_by: str | None) -> Callable[[str], str]:
    """A function: photo path -> group name. Raises UserError for an invalid regular expression."""
    try:
        pattern = None if group_by is None else re.compile(group_by)
    except re.error as error:
        raise UserError(f"--group-by {group_by!r}: not a regular expression ({error})") from error

    def group(path: str) -> str:
        name = path.rpartition("/")[2]
        match = pattern.search(name) if pattern is not None else None
        if match is None:
            return (path if pattern is None else name).rpartition(".")[0]
        return match.group(1) if match.re.groups and match.group(1) is not None else match.group(0)

    return group


def distinct_pills(pills: Iterable[tuple[str, Box | None]]) -> tuple[list[tuple[str, Box | None]], int, bool]:
    """(pills without repetitions, number of repetitions, whether two classes share a box)."""
    listed = list(pills)
    kept = list(dict.fromkeys(listed)) if len(listed) > 1 else listed
    boxed = [box for _, box in kept if box is not None]
    # Pills without a box may be equal: two tablets of one drug.
    if len(boxed) < len(kept):
        kept = [pill for index, pill in enumerate(listed) if pill[1] is None or pill not in listed[:index]]
        boxed = [box for _, box in kept if box is not None]
    return kept, len(listed) - len(kept), len(set(boxed)) < len(boxed)
