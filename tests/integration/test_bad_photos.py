"""1,000 photos, ten of them with one fault each, through the training stream and the audit."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pytest

from pillsnap.data.augment import FrameJitter
from pillsnap.data.plan import StreamPlan
from pillsnap.data.recipes import FrameRecipe
from pillsnap.data.samples import detection_samples
from pillsnap.data.stream import Stream, batches_of, share_samples
from pillsnap.manifest.audit.audit import audit
from pillsnap.manifest.table import SCHEMA, class_list, write_manifest
from pillsnap.photos.reader import PhotoReader
from pillsnap.synthetic.faults import FAULTS

NUM_PHOTOS, SIDE_PX = 1000, 48


def pixels(number: int) -> np.ndarray:
    """A distinct smooth picture with few enough colours for a palette."""
    coarse = np.random.default_rng(number).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    smooth = cv2.resize(coarse, (12, 12), interpolation=cv2.INTER_CUBIC)
    return smooth.repeat(SIDE_PX // 12, 0).repeat(SIDE_PX // 12, 1)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest, next to its photos. Every hundredth photo is bad and named after its fault."""
    root = tmp_path_factory.mktemp("bad_photos")
    bad = dict(zip(range(50, NUM_PHOTOS, 100), FAULTS.items(), strict=True))
    rows = []
    for number in range(NUM_PHOTOS):
        if number in bad:
            name, fault = bad[number]
            path, data = name + fault.extension, fault.spoil(pixels(number))
        else:
            path = name = f"good{number}"
            path += ".png"
            data = cv2.imencode(".png", pixels(number)[..., ::-1])[1].tobytes()
        (root / path).write_bytes(data)
        rows.append(
            {"sample_id": name, "image_path": path, "image_type": "single", "codes": ["pill"],
             "boxes": [[8, 8, 16, 16]], "width": SIDE_PX, "height": SIDE_PX, "group": name,
             "split": "val" if number % 10 == 9 else "train", "source": str(number)}
        )  # fmt: skip
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    return write_manifest(table, root, class_list(table))


@pytest.mark.usefixtures("ray_local")
def test_exactly_the_unreadable_photos_are_quarantined(manifest: Path) -> None:
    from pillsnap.manifest.table import read_manifest

    table = read_manifest(manifest)
    numbers = dict(zip(table["sample_id"].to_pylist(), map(int, table["source"].to_pylist()), strict=True))
    samples = detection_samples(table)
    stream = Stream(
        StreamPlan(3, 1, len(samples.train), len(samples.val), 50, 1), FrameRecipe(SIDE_PX, FrameJitter(), 4, 0, 1),
        PhotoReader(str(manifest.parent), 10**7), share_samples(samples.train), share_samples(samples.val), 4, 0.5,
    )  # fmt: skip
    quarantined: dict[str, str] = {}
    worst: dict[str, float] = {}
    for batch in batches_of(stream.dataset()):
        part = samples.train if batch["training"] else samples.val
        quarantined |= dict(json.loads(str(batch["quarantine"])))
        for image, number, valid in zip(batch["image"], batch["index"], batch["valid"], strict=True):
            if valid:
                sample_id = part["sample_id"][int(number)].as_py()
                worst[sample_id] = np.abs(image.astype(int) - pixels(numbers[sample_id])).mean()
    assert {name: reason.partition(":")[0] for name, reason in quarantined.items()} == {
        name: fault.reason for name, fault in FAULTS.items() if fault.reason
    }
    assert len(worst) == NUM_PHOTOS - len(quarantined)
    assert not set(worst) & set(quarantined)
    allowed = {name: fault.tolerance for name, fault in FAULTS.items()}
    assert {name: error for name, error in worst.items() if error > allowed.get(name, 0.0)} == {}


@pytest.mark.parametrize("deep", [False, True])
def test_audit_lists_each_bad_photo(manifest: Path, deep: bool) -> None:
    report = audit(manifest, manifest.parent, deep=deep)
    found = {one.kind: sorted(Path(e.split(" ")[0]).stem for e in one.examples) for one in report.findings
             if one.severity == "error"}  # fmt: skip
    assert not report.fit
    assert found == {
        "truncated": ["cut_jpeg", "cut_png"], "empty": ["empty"], "not_an_image": ["text"],
        "too_large": ["huge_header"], "other_size": ["wrong_size"],
    }  # fmt: skip
