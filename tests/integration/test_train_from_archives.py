"""Training from ZIP archives uses the same samples as from the unpacked tree."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pyarrow.compute as pc
import pytest

from pillsnap.config import load_settings
from pillsnap.data.augment import CropJitter, FrameJitter
from pillsnap.data.plan import StreamPlan
from pillsnap.data.recipes import CropRecipe, FrameRecipe
from pillsnap.data.samples import classification_samples, detection_samples
from pillsnap.data.stream import Stream, batches_of, share_samples
from pillsnap.manifest.build import build_manifest
from pillsnap.manifest.table import read_classes, read_manifest
from pillsnap.photos.reader import PhotoReader


def zip_tree(root: Path, to: Path, compression: int) -> None:
    """One archive per TS_* or TL_* folder, with AI Hub's names."""
    to.mkdir(parents=True)
    for part in sorted(root.glob("train/*/*/T?_*")):
        name = part.name.replace("single", "단일").replace("combo", "조합")
        with zipfile.ZipFile(to / f"{name}.zip", "w", compression) as archive:
            for path in sorted(part.rglob("*")):
                archive.write(path, path.relative_to(part).as_posix())


@pytest.fixture(scope="module", params=[zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
def zipped_tree(request: pytest.FixtureRequest, toy_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("zipped") / "root"
    zip_tree(toy_tree, root / "원천데이터", request.param)
    return root


def stream_bytes(manifest: Path, root: Path, task: str) -> dict[tuple[int, bool, int], dict[str, bytes]]:
    """Every array of every batch of two epochs, of the Ray Data stream, by epoch, kind and step."""
    table = read_manifest(manifest)
    codes = [info.code for info in read_classes(manifest.parent)]
    if task == "classification":
        samples, recipe = classification_samples(table, codes), CropRecipe(48, 0.1, CropJitter(0.1, 0.1, 180, 0.1))
    else:
        jitter = FrameJitter(mosaic=1.0, scale=0.4, flip_horizontal=0.5)
        samples, recipe = detection_samples(table), FrameRecipe(64, jitter, 4, 2, 4)
    stream = Stream(
        StreamPlan(5, 2, len(samples.train), len(samples.val), 8, 1), recipe, PhotoReader(str(root), 10**7),
        share_samples(samples.train), share_samples(samples.val), 2, 0.5,
    )  # fmt: skip
    found = {}
    for batch in batches_of(stream.dataset()):
        assert json.loads(str(batch["quarantine"])) == []
        step = (int(batch["epoch"]), bool(batch["training"]), int(batch["step"]))
        found[step] = {
            name: values.tobytes() for name, values in batch.items() if name not in ("quarantine", "stage_s")
        }
    return found


@pytest.mark.usefixtures("ray_local")
def test_zipped_and_unpacked_tree_train_on_identical_samples(toy_tree: Path, zipped_tree: Path, tmp_path: Path) -> None:
    options = {"num_photos": None, "num_classes": None, "val_fraction": 0.25}
    unpacked = build_manifest(toy_tree, tmp_path / "unpacked", **options).path
    zipped = build_manifest(zipped_tree, tmp_path / "zipped", **options).path
    tables = [read_manifest(path) for path in (unpacked, zipped)]
    assert tables[0]["sample_id"].to_pylist() == tables[1]["sample_id"].to_pylist()
    assert tables[1]["archive"].null_count == 0
    for task in ("classification", "detection"):
        first, second = (stream_bytes(p, r, task) for p, r in ((unpacked, toy_tree), (zipped, zipped_tree)))
        assert len(first) > 4
        assert first == second


@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("zipped_tree", [zipfile.ZIP_DEFLATED], indirect=True, ids=["deflated"])
def test_a_whole_run_from_archives(zipped_tree: Path, tmp_path: Path) -> None:
    """Trained and judged without one unpacked file: every validation photo is in the predictions, none unread."""
    from rich.console import Console

    from pillsnap.cluster.preflight import preflight
    from pillsnap.observe.events import read_events
    from pillsnap.runs.directory import open_run
    from pillsnap.train.driver import train_and_evaluate

    settings = load_settings(
        "demo",
        {
            "detection.image_size_px": 64, "detection.epochs": 1, "detection.mosaic_off_epochs": 0,
            "detection.batch_size": 8, "classification.image_size_px": 32, "classification.epochs": 1,
            "classification.batch_size": 16, "train.cpus_per_worker": 0.25, "data.decoding_cpus": 0.5,
            "wandb.mode": "disabled",
        },
    )  # fmt: skip
    manifest = build_manifest(zipped_tree, tmp_path / "m", num_photos=None, num_classes=None, val_fraction=0.25).path
    checks = {check.name: check for check in preflight(settings, tmp_path / "run", manifest, str(zipped_tree))}
    assert checks["photos"].ok, checks["photos"]
    run, _ = open_run(tmp_path / "run", settings, manifest, zipped_tree)
    metrics = train_and_evaluate(run, Console(quiet=True))
    table = read_manifest(manifest)
    num_val = table.filter(pc.equal(table["split"], "val")).num_rows
    assert metrics["detection"]["num_photos"] == num_val
    assert [event for event in read_events(run.run_dir) if event["kind"] == "quarantine"] == []
    report = (run.run_dir / "report.html").read_text(encoding="utf-8")
    assert "cannot be shown" not in report
    assert "<svg" in report or "<img" in report
