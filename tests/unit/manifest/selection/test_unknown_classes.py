"""Classes left out of training stay in validation alone, and nothing changes without them."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from pillsnap.manifest.attribute_table import AttributeTable, add_to_manifest
from pillsnap.manifest.audit.audit import audit
from pillsnap.manifest.build import build_manifest
from pillsnap.manifest.selection.unknown_classes import choose_unknown, leave_out
from pillsnap.manifest.table import read_classes, read_manifest, read_unknown
from tests.unit.conftest import Tree
from tests.unit.conftest import build_manifest as table_of


def codes_of(table: pa.Table, split: str) -> set[str]:
    return {code for codes in table.filter(pc.equal(table["split"], split))["codes"].to_pylist() for code in codes}


def test_share_of_the_classes_is_validated_as_unknown(tree: Tree, tmp_path: Path) -> None:
    tree.many(10, combinations=10)
    without = build_manifest(tree.root, tmp_path / "plain", num_photos=None, num_classes=None)
    zero = build_manifest(tree.root, tmp_path / "zero", num_photos=None, num_classes=None, unknown_classes=0.0)
    assert zero.path.read_bytes() == without.path.read_bytes()
    assert "unknown_classes" not in json.loads((tmp_path / "zero/classes.json").read_text())

    result = build_manifest(tree.root, tmp_path / "out", num_photos=None, num_classes=None, unknown_classes=0.2)
    unknown = read_unknown(tmp_path / "out")
    assert len(unknown) == 2
    table, before = read_manifest(result.path), read_manifest(without.path)
    classes = [info.code for info in read_classes(tmp_path / "out")]
    assert len(classes) == 8 and not set(classes) & set(unknown)
    assert codes_of(table, "train") == set(classes)
    assert codes_of(table, "val") == set(classes) | set(unknown)
    # Every photo of one pill of an unknown class, and no photo that shows it beside others.
    shown = [row for row in table.to_pylist() if set(row["codes"]) & set(unknown)]
    assert len(shown) == 2 * 24 and {row["split"] for row in shown} == {"val"}
    assert all(row["image_type"] == "single" for row in shown)
    # All other rows are those of the manifest without the setting, in its order.
    kept = [row for row in before.to_pylist() if not set(row["codes"]) & set(unknown)]
    assert [row for row in table.to_pylist() if not set(row["codes"]) & set(unknown)] == kept
    assert result.report["left_out"]["unknown_classes"] == {"count": 2, "listed": unknown}
    assert result.report["left_out"]["photos_with_unknown_classes"] == len(before) - len(table) > 0
    assert any("left out of training" in note and "unknown: 2" in note for note in result.report["notes"])

    def kinds() -> set[str]:
        return {found.kind for found in audit(result.path, tree.root).findings}

    assert not kinds() & {"class_only_in_val", "unknown_trained"}
    add_to_manifest(result.path.parent, AttributeTable(tmp_path, {classes[0]: {"shape": "원형"}}))
    assert read_unknown(tmp_path / "out") == unknown  # a table of attributes keeps the list


def test_a_class_without_training_photos_left_is_dropped() -> None:
    rows = [
        {"sample_id": "a", "codes": ["K-1"], "image_type": "single", "split": "train"},
        {"sample_id": "b", "codes": ["K-1", "K-2"], "image_type": "combination", "split": "train"},
        {"sample_id": "c", "codes": ["K-2", "K-3"], "image_type": "combination", "split": "val"},
        {"sample_id": "d", "codes": ["K-3"], "image_type": "single", "split": "train"},
    ]
    table = table_of([{**row, "boxes": [None] * len(row["codes"])} for row in rows])
    assert choose_unknown(table, 0.7, 0) == ["K-1", "K-3"]  # never K-2, which has no photo of one pill
    assert choose_unknown(table, 0.0, 0) == []
    left = leave_out(table, ["K-1"])
    # K-2 was trained by photo b alone.
    assert [(row["sample_id"], row["split"]) for row in left.to_pylist()] == [("a", "val"), ("d", "train")]
