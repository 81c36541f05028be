"""Replaces attributes of Ray's modules for a while."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass
class _Patch:
    original: Any
    users: int = 0


_lock = threading.Lock()
_patches: dict[tuple[Any, str], _Patch] = {}


def original(owner: Any, name: str) -> Any:
    """Ray's own attribute, also while it is replaced. Raises AttributeError if Ray has none."""
    patch = _patches.get((owner, name))
    return patch.original if patch else getattr(owner, name)


@contextmanager
def replaced(*replacements: tuple[Any, str, Any]) -> Iterator[None]:
    """Set (owner, attribute, value); the last of several concurrent users puts the originals back."""
    with _lock:
        for owner, name, value in replacements:
            patch = _patches.setdefault((owner, name), _Patch(getattr(owner, name)))
            patch.users += 1
            setattr(owner, name, value)
    try:
        yield
    finally:
        with _lock:
            for owner, name, _ in replacements:
                patch = _patches[owner, name]
                patch.users -= 1
                if not patch.users:
                    setattr(owner, name, patch.original)
                    del _patches[owner, name]
