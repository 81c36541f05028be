"""CSV files as the owner of Stage 3 wrote them: absolute paths of another disk, one code for a combination of four.

Rows that look like theirs are made up here; PILLSNAP_SEED_MANIFESTS names a folder with the two real files.
"""

from __future__ import annotations

import csv
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pillsnap.cli.main import app
from pillsnap.manifest.import_csv import import_csv
from pillsnap.manifest.table import read_classes, read_manifest
from tests.unit.conftest import Tree

HEADER = ["image_path", "mapping_code", "image_type", "source"]
NAMES = {"train": "manifest_train_combo.csv", "val": "manifest_val_combo.csv"}
COUNTS = {"train": 4023, "val": 977}


def write_look_alikes(folder: Path, counts: dict[str, int], seed: int = 3) -> None:
    """Rows of combinations of two to four drugs at three latitudes, split photo by photo as the owner did."""
    rng = random.Random(seed)
    drugs = [f"{number:06d}" for number in rng.sample(range(100, 42_000), 90)]
    photos: dict[str, Any] = {}
    while len(photos) < sum(counts.values()):
        codes = "-".join(sorted(rng.sample(drugs, rng.randint(2, 4))))
        part = rng.randint(1, 8)
        for latitude in (70, 75, 90):
            name = f"K-{codes}/K-{codes}_0_2_0_2_{latitude}_000_200.png"
            photos[name] = f"/home/owner/pillsnap_data/train/images/combination/TS_{part}_combo/{name}"
    paths = sorted(photos.values())[: sum(counts.values())]
    rng.shuffle(paths)
    for split, count in counts.items():
        taken, paths = paths[:count], paths[count:]
        with (folder / NAMES[split]).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(HEADER)
            for path in taken:
                writer.writerow([path, "-".join(path.rpartition("/")[2].split("-")[:2]), "combination", "train"])


def check_import(folder: Path, out: Path) -> int:
    """Import both files and compare every row with its line, parsed independently; return the number of rows."""
    expected = {}
    for split, name in NAMES.items():
        with (folder / name).open(newline="", encoding="utf-8") as file:
            for line in csv.DictReader(file):
                inner = line["image_path"].partition("/pillsnap_data/")[2]
                codes = ["K-" + digits for digits in inner.rpartition("/")[2].partition("_")[0].split("-")[1:]]
                assert codes[0] == line["mapping_code"]
                expected[inner] = (split, codes)
    rows = read_manifest(import_csv(folder, out)).to_pylist()
    assert {row["image_path"]: (row["split"], row["codes"]) for row in rows} == expected
    for row in rows:
        assert row["image_type"] == "combination"
        assert row["boxes"] == [None] * len(row["codes"])
        assert row["group"] == row["image_path"].split("/")[-2]
        assert row["latitude"] in (70, 75, 90)
    return len(rows)


def test_synthetic_files_are_read_completely(tmp_path: Path) -> None:
    write_look_alikes(tmp_path, COUNTS)
    assert check_import(tmp_path, tmp_path / "out") == 5000
    codes = {code for row in read_manifest(tmp_path / "out")["codes"].to_pylist() for code in row}
    assert {len(code) for code in codes} == {8}  # leading zeros are there
    assert [info.code for info in read_classes(tmp_path / "out")] == sorted(codes)
    # The owner split photo by photo: twins on both sides are said, not mended.
    report = json.loads((tmp_path / "out/import_report.json").read_text(encoding="utf-8"))
    assert (report["num_train"], report["num_val"]) == (4023, 977)
    assert report["problems"]["groups_on_both_sides"]["count"] > 100


def test_real_files_are_read_completely(tmp_path: Path) -> None:
    folder = os.environ.get("PILLSNAP_SEED_MANIFESTS")
    if not folder or not all(Path(folder, name).is_file() for name in NAMES.values()):
        pytest.skip(f"PILLSNAP_SEED_MANIFESTS names no folder with {' and '.join(NAMES.values())}")
    assert check_import(Path(folder), tmp_path / "out") == 5000
    splits = read_manifest(tmp_path / "out")["split"].to_pylist()
    assert {split: splits.count(split) for split in COUNTS} == COUNTS


def test_command_takes_files_or_their_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PILLSNAP_DATA_ROOT", raising=False)
    write_look_alikes(tmp_path, {"train": 40, "val": 10})
    files = [str(tmp_path / name) for name in NAMES.values()]
    results = []
    for name, sources in (("a", [str(tmp_path)]), ("b", files)):
        arguments = ["manifest", "import", *sources, "--format", "csv", "--out", str(tmp_path / name)]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        assert "groups_on_both_sides" in result.output
        results.append((tmp_path / name / "manifest.parquet").read_bytes())
    assert results[0] == results[1]


def test_command_takes_photos_and_boxes_from_the_data_root(tree: Tree, tmp_path: Path) -> None:
    write_look_alikes(tmp_path, {"train": 9, "val": 3})
    for name in NAMES.values():
        for line in (tmp_path / name).read_text(encoding="utf-8").splitlines()[1:]:
            stem = line.split(",")[0].rpartition("/")[2][:-4]
            part, latitude = line.partition("TS_")[2][0], int(stem.split("_")[5])
            codes = ["K-" + digits for digits in stem.partition("_")[0].split("-")[1:]]
            tree.combination(codes, latitude=latitude, part=int(part))
    arguments = ["manifest", "import", str(tmp_path), "--format", "csv", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*arguments, "--data-root", str(tree.root)])
    assert result.exit_code == 0, result.output
    table = read_manifest(tmp_path / "out")
    assert all((tree.root / path).is_file() for path in table["image_path"].to_pylist())
    assert all(box == [10 + i, 12, 20.5, 8] for boxes in table["boxes"].to_pylist() for i, box in enumerate(boxes))
