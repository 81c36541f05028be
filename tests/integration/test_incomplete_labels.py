"""Detection on photos with missing boxes, their unlabelled areas masked in the loss. Without Ray."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pillsnap.manifest.table import SCHEMA, read_manifest
from tests.reliability.harness import LoopRun, tiny


def test_photos_with_missing_boxes_train_when_masked(toy_manifest: Path, toy_tree: Path, tmp_path: Path) -> None:
    rows = read_manifest(toy_manifest).to_pylist()
    incomplete = [row for row in rows if row["split"] == "train" and len(row["boxes"]) > 1]
    for row in incomplete:
        row["boxes"][0] = None
    folder = tmp_path / "manifest"
    shutil.copytree(toy_manifest.parent, folder)
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), folder / "manifest.parquet")
    names = {row["sample_id"] for row in incomplete}
    assert len(names) >= 3
    for choice, used in (("leave_out", False), ("mask", True)):
        settings = tiny(detection__incomplete_labels=choice, detection__epochs=2)
        run = LoopRun(tmp_path / choice, "detection", settings, folder / "manifest.parquet", toy_tree)
        run.train()
        trained = set(run.samples.train["sample_id"].to_pylist())
        assert names <= trained if used else not names & trained
        losses = [event["loss"] for event in run.events("step")]
        assert len(losses) == 2 * run.plan.train_steps and all(map(math.isfinite, losses))
        assert run.events("warning") == []
