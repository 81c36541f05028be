"""Small sets of photos with known labels."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pillsnap.manifest.import_folder import ImportOptions, import_folder
from pillsnap.manifest.table import read_manifest

ROW = "0 0.5 0.5 0.2 0.1"


def save_photo(path: Path, size: tuple[int, int] = (100, 200), **options: Any) -> None:
    """A photo of `size` (width, height) in the format of its ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(sum(str(path).encode())).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)


def save_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


class Imported:
    """Rows and report of one import."""

    def __init__(self, root: Path, out: Path, **options: Any) -> None:
        import_folder(root, out, ImportOptions(**options))
        self.rows = {row["image_path"]: row for row in read_manifest(out).to_pylist()}
        self.report = json.loads((out / "import_report.json").read_text(encoding="utf-8"))
        self.problems = {kind: entry["listed"] for kind, entry in self.report["problems"].items()}
        self.splits = {path: row["split"] for path, row in self.rows.items()}


Load = Callable[..., Imported]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Imports tmp_path/set with the given options."""
    return lambda **options: Imported(tmp_path / "set", tmp_path / "out", **options)
