"""Average precision of a trained detector's predictions, compared with pycocotools'; without Ray."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pytest

from benchmarks.average_precision import compare
from pillsnap.evaluate.predictions import Predictions
from pillsnap.evaluate.two_stage import TwoStage
from pillsnap.manifest.table import read_manifest
from tests.reliability.harness import LoopRun, tiny


def test_average_precision_of_a_trained_detector_equals_pycocotools(
    toy_manifest: Path, toy_tree: Path, tmp_path: Path
) -> None:
    # Overfitted: no augmentation, evaluated also on the training photos. So short a training depends on the seed more
    # than on anything else: mAP@0.5:0.95 of seeds 42 and 43 was 0.25 and 0.05 at 64 px and lr 5e-3 in single precision,
    # 0.16 and 0.00 with boxes and scores in bfloat16, 0.40 and 0.07 at 96 px and 8e-3. These settings keep seed 42 far
    # from the limit below; they make up for no loss of precision.
    still = dict.fromkeys(("mosaic", "scale", "translate", "flip_horizontal", "flip_vertical", "hue", "saturation",
                           "brightness"), 0.0)  # fmt: skip
    settings = tiny(
        detection__image_size_px=96, detection__batch_size=8, detection__epochs=48, detection__mosaic_off_epochs=0,
        detection__lr=8e-3, detection__warmup_epochs=1, train__ema_warmup_steps=1, train__log_every_steps=1000,
        **{f"detection__{name}": value for name, value in still.items()},
    )  # fmt: skip
    run = LoopRun(tmp_path, "detection", settings, toy_manifest, toy_tree)
    run.train()
    models = TwoStage(tmp_path, settings, run.codes, classify=False)
    manifest = read_manifest(toy_manifest)
    rows = []
    for sample_id, image_path in zip(
        *(manifest[name].to_pylist() for name in ("sample_id", "image_path")), strict=True
    ):
        photo = run.source.reader.read(image_path)
        (found,) = models.detect([photo])
        rows.append({"sample_id": sample_id, "image_type": "single", "boxes": found.boxes.tolist(),
                     "scores": found.scores.tolist()})  # fmt: skip
    shutil.copy(toy_manifest, tmp_path)
    Predictions(pa.Table.from_pylist(rows), None, None, {}).write(tmp_path)
    for split in ("train", "val"):
        metrics = compare(tmp_path, split)
        assert 0.1 < metrics["pycocotools_map50_95"] < metrics["pycocotools_map50"]
        for name in ("map50", "map50_95"):
            assert metrics[f"{name}_coco"] == pytest.approx(metrics[f"pycocotools_{name}"], abs=1e-9)
