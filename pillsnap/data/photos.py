"""Bytes of the photos that a manifest names, read from beneath one data root and from nowhere else."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from pillsnap.errors import UserError


class PhotoStore:
    """Reads photos by their manifest path, relative to a local folder or to a pyarrow file system's URI."""

    def __init__(self, root: str | Path) -> None:
        self.root = str(root)
        self._filesystem: Any = None

    def read(self, image_path: str) -> bytes:
        """Bytes of one photo. Raises UserError when the path leaves the root, or OSError when it cannot be read."""
        check_relative(image_path)
        if len(urlsplit(self.root).scheme) > 1:
            return self._read_remote(image_path)
        path = os.path.join(self.root, image_path)
        # Opening a FIFO would wait for a writer for ever: without O_NONBLOCK the run hangs on one hostile file.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            if not os.path.isfile(path):
                raise UserError(f"{image_path} is not a regular file.")
            return file.read()

    def _read_remote(self, image_path: str) -> bytes:
        from pyarrow import fs

        if self._filesystem is None:
            filesystem, base = fs.FileSystem.from_uri(self.root)
            self._filesystem = fs.SubTreeFileSystem(base, filesystem)
        with self._filesystem.open_input_stream(image_path) as stream:
            return stream.read()


def check_relative(image_path: str) -> None:
    """Raise UserError unless the path stays beneath its root by name: relative, no `..`, no NUL."""
    path = PurePosixPath(image_path)
    if not image_path or path.is_absolute() or ".." in path.parts or "\0" in image_path or "\\" in image_path:
        raise UserError(f"The manifest names {image_path!r}, which is not a path beneath the data root.")
