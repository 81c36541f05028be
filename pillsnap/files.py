"""Atomic writes of local files."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path

MISSING = (FileNotFoundError, NotADirectoryError)
"""A file is not there. Every other OSError means that it is, and cannot be read."""


def write_json(path: Path, payload: object) -> None:
    """Write JSON for people and scripts, atomically: UTF-8, two-space indent; names that are not UTF-8 are escaped."""
    text = json.dumps(payload, ensure_ascii=False, indent=2) + "\n"
    write_atomically(path, text.encode("utf-8", "backslashreplace"))


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Write to a temporary name in the same folder, sync, then rename over `path`."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")  # unique: nodes may share the folder
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
