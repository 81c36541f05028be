"""Reads a few photos of a list, to see whether they are there."""

from __future__ import annotations

from collections.abc import Sequence

from pillsnap.errors import UserError
from pillsnap.photos.files import PhotoStore

_PHOTOS_TRIED = 20


def try_photos(paths: Sequence[str], data_root: str) -> tuple[int, list[str]]:
    """Number of evenly spaced photos that were read, and one line for each that is empty or cannot be read."""
    tried = paths[:: max(1, len(paths) // _PHOTOS_TRIED)][:_PHOTOS_TRIED]
    store = PhotoStore(data_root)
    return len(tried), [f"{path} ({problem})" for path in tried if (problem := _problem(store, path))]


def _problem(store: PhotoStore, path: str) -> str:
    try:
        return "" if store.read(path) else "empty"
    except (OSError, UserError) as error:
        return str(error)
