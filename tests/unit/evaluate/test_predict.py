"""Photos that `pillsnap predict` passes to the models; the models are tested in tests/integration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pillsnap.config import load_settings
from pillsnap.errors import UserError
from pillsnap.evaluate import predict
from pillsnap.manifest.table import SCHEMA, ClassInfo, write_manifest
from pillsnap.photos.archives import parse_location
from pillsnap.runs.directory import Run, open_run

PHOTO = {"image_type": "single", "codes": ["K-1"], "boxes": [None], "width": 10, "height": 10, "source": "test"}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    rows = [
        {"sample_id": "a", "image_path": "TS_1/a.png", "archive": "TS_1.zip", "offset": 40, "length": 7,
         "compression": 0, "split": "val", "group": "a"},
        {"sample_id": "b", "image_path": "TS_1/b.png", "split": "train", "group": "b"},
        {"sample_id": "c", "image_path": "TS_1/c.png", "split": "val", "group": "c"},
    ]  # fmt: skip
    table = pa.Table.from_pylist([PHOTO | row for row in rows], SCHEMA)
    write_manifest(table, tmp_path / "manifest", [ClassInfo("K-1", 0)])
    return open_run(tmp_path / "run", load_settings("demo"), tmp_path / "manifest", tmp_path)[0]


def test_photos_of_a_split_are_read_by_location(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, list[str]] = {}

    def infer(table: pa.Table, *_: Any, **__: Any) -> list[dict[str, Any]]:
        asked.update(table.select(["sample_id", "location"]).to_pydict())
        nothing = dict.fromkeys(("named_top", "named_probs", "boxes", "scores"))
        return [{"sample_id": name, "error": "missing"} | nothing for name in reversed(asked["sample_id"])]

    monkeypatch.setattr(predict, "infer", infer)
    entries = predict.predict_manifest_photos(run, tmp_path / "manifest", None, "val")
    assert [(entry["path"], entry["error"], entry["pills"]) for entry in entries] == [
        ("TS_1/a.png", "missing", []), ("TS_1/c.png", "missing", []),
    ]  # fmt: skip
    place = parse_location(asked["location"][0])
    assert place is not None and (place.archive, place.offset, place.length) == ("TS_1.zip", 40, 7)
    assert asked["location"][1] == "TS_1/c.png"
    with pytest.raises(UserError, match="no photo of the split 'test'"):
        predict.predict_manifest_photos(run, tmp_path / "manifest", None, "test")
