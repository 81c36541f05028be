"""The scaling model against measurements: its costs are the recorded figures, and it predicts the recorded rates."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from benchmarks.scaling_model import Cluster, Costs, Work, demand, gpus_until, head_memory_bytes, simulate, works
from pillsnap.data.samples import classification_samples, detection_samples
from pillsnap.manifest.table import read_manifest

LOG = (Path(__file__).resolve().parents[2] / "benchmarks" / "log" / "loader.md").read_text(encoding="utf-8")
COSTS = Costs()
CROP_BYTES = 224 * 224 * 3


def recorded(row: str) -> float:
    """The first figure of a row of the loader log."""
    (found,) = re.findall(rf"^\| {re.escape(row)} \| ([\d,.]+)", LOG, re.M)
    return float(found.replace(",", ""))


def test_costs_are_the_recorded_figures() -> None:
    crops = recorded("PillSnap, store, decoded in Ray Data tasks")
    (mosaics,) = re.findall(r"^\| PillSnap \| (\d+), [\d.]+ times \|", LOG, re.M)
    expected = {
        "crop_from_photo_s": 2 / recorded("limit: two processes read, decode, warp"),
        "crop_from_store_s": 2 / recorded("limit: two processes decode, warp"),
        "frame_from_photo_s": 2 / float(mosaics),
        "row_s": (0.1 + 0.25) / 2 / (crops / 64),
    }
    for name, value in expected.items():
        assert getattr(COSTS, name) == pytest.approx(value, rel=0.1), name
    assert f"{COSTS.photo_bytes / 1e6:.2f} MB each" in LOG
    assert f"{COSTS.stored_crop_bytes / 1e3:.1f} kB each" in LOG
    assert "a batch of 9.6 MB costs 5.8 ms to put into the object store" in LOG


@pytest.mark.parametrize(
    ("row", "work"),
    [
        ("PillSnap, direct", Work("", 64, COSTS.crop_from_photo_s, CROP_BYTES, 0, 0)),
        ("PillSnap, store, decoded in Ray Data tasks", Work("", 64, COSTS.crop_from_store_s, CROP_BYTES, 0, 0, 8)),
    ],
)
def test_simulation_predicts_the_recorded_rate(row: str, work: Work) -> None:
    """From the costs of bare loops, handing over and scheduling; nothing is fitted to these two."""
    rate = simulate(work, Cluster(1, 2.0, shared=True), COSTS).images_per_s
    assert rate == pytest.approx(recorded(row), rel=0.2)


def test_memory_of_a_sample_row_is_the_assumed_one(toy_manifest: Path) -> None:
    manifest = read_manifest(toy_manifest)
    codes = sorted({code for row in manifest["codes"].to_pylist() for code in row})
    large = pa.concat_tables([manifest] * 100).combine_chunks()
    stored = large.drop_columns("location")  # shares the memory of image_path
    assert stored.nbytes / len(large) == pytest.approx(COSTS.manifest_row_bytes, rel=0.1)
    crops, frames = classification_samples(large, codes).train, detection_samples(large).train
    assert crops.combine_chunks().nbytes / len(crops) == pytest.approx(COSTS.crop_row_bytes, rel=0.1)
    assert frames.combine_chunks().nbytes / len(frames) == pytest.approx(COSTS.frame_row_bytes, rel=0.1)
    sizes = head_memory_bytes(2_630_000, COSTS)
    assert sizes["driver: the manifest"] == pytest.approx(0.75e9, rel=0.01)


def test_the_limit_is_found() -> None:
    """Few cores limit; with many, the scheduling loop or the GPUs do."""
    work = replace(works(COSTS)["classification, photos"], gpu_images_per_s=10_000.0)
    few = simulate(work, Cluster(2, 4), COSTS)
    assert few.cores_busy == pytest.approx(4, rel=0.05) and few.wait_fraction > 0.9
    many = simulate(work, Cluster(64, 10_000), COSTS)
    assert many.coordinator_busy == pytest.approx(1, rel=0.02)
    assert many.images_per_s == pytest.approx(32 / COSTS.row_s, rel=0.02)
    slow = replace(work, gpu_images_per_s=10.0)
    idle = simulate(slow, Cluster(4, 64), COSTS)
    assert idle.images_per_s == pytest.approx(40, rel=0.02) and idle.wait_fraction < 0.05


def test_demand_and_the_number_of_gpus_agree() -> None:
    for work in works(COSTS).values():
        gpus = gpus_until(work, COSTS)
        assert demand(work, gpus, COSTS).coordinator_cores <= 1 < demand(work, gpus + 1, COSTS).coordinator_cores
