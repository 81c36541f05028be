"""Is a pill named better by both sides than by one? Pills whose front is blank, so that only the back tells them apart.

    python -m benchmarks.both_sides --out DIR [--classes 60] [--likeness back] [--passes 0.333] [--weights FILE]

Photos as in benchmarks.imprints with `--likeness back`, split by group. One process trains a classifier with the real
loop, and names pairs of validation photos, cut at their label boxes. Beside each photo alone, other ways to join two
answers are printed (`ways`). Killed, the same command continues.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.imprints import VIEWS_PER_CLASS, prepare
from benchmarks.short_epochs import SETTINGS, WHOLE_EPOCHS, KeptSource
from pillsnap.config import load_settings
from pillsnap.data.windows import Photo
from pillsnap.evaluate.both_sides import manifest_pairs
from pillsnap.evaluate.two_stage import TwoStage
from pillsnap.export.pipeline import softmax
from pillsnap.manifest.table import read_manifest
from pillsnap.metrics.both_sides import SidePairs, both_sides_metrics
from pillsnap.photos.reader import PhotoReader
from pillsnap.train.schedule.epochs import stream_plan
from tests.reliability.harness import LoopRun

JOINED: dict[str, Any] = {
    "both alike": lambda front, back: front + back,
    "geometric mean": lambda front, back: (front + back) / 2,
    "mean": lambda front, back: np.log(softmax(front) + softmax(back) + 1e-30),
    "the surer photo": lambda front, back: np.where(
        (softmax(front).max(1) > softmax(back).max(1))[:, None], front, back
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the photos and the run")
    parser.add_argument("--classes", type=int, default=60)
    parser.add_argument("--likeness", choices=("back", "shared"), default="back", help="shared: both sides tell")
    parser.add_argument("--passes", type=float, default=0.333, help="share of the passes of 18 whole epochs")
    parser.add_argument("--size", type=int, default=72)
    parser.add_argument("--weights", default="random", help="file of the initial weights")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    prepare(options.out, options.classes, VIEWS_PER_CLASS, 0, likeness=options.likeness)
    own = SETTINGS["classification"] | {
        "image_size_px": options.size, "epochs": WHOLE_EPOCHS, "validate_every": WHOLE_EPOCHS, "warmup_epochs": 1,
        "weights": options.weights,
    }  # fmt: skip
    settings = load_settings(
        "demo",
        {f"classification.{key}": value for key, value in own.items()}
        | {"train.seed": options.seed, "train.log_every_steps": 100, "wandb.mode": "disabled", "train.amp": "off"},
    )
    folder = options.out / f"run-{options.seed}"
    folder.mkdir(exist_ok=True)
    run = LoopRun(folder, "classification", settings, options.out / "run" / "manifest.parquet", options.out / "photos")
    per_epoch = options.passes * len(run.samples.train) / settings.classification.batch_size
    steps = max(1, round(per_epoch)) * settings.classification.batch_size
    run.plan = stream_plan(
        settings.classification.model_copy(update={"samples_per_epoch": steps}), options.seed, run.samples
    )
    run.source = KeptSource(run.source.reader)
    run.source.start(run.task.recipe(run.samples), run.samples.train)
    run.train()
    manifest = read_manifest(options.out / "run")
    photos = {row["sample_id"]: row for row in manifest.to_pylist() if row["split"] == "val"}
    pairs = manifest_pairs(manifest.filter(np.array(manifest["split"]) == "val"), run.codes)
    models, reader = TwoStage(folder, settings, run.codes), PhotoReader(str(options.out / "photos"), 10**7)

    def logits(sample_id: str) -> np.ndarray:
        row = photos[sample_id]
        data = reader.read_bytes(row["location"])
        assert isinstance(data, bytes)
        return models.classify([Photo(data, 10**7)], [np.array(row["boxes"], np.float32)])[0].logits[0]

    torch.set_num_threads(1)
    front, back = (np.stack([logits(pair[i]) for pair in pairs]) / models.temperature for i in (0, 1))
    labels = np.array([run.codes.index(photos[pair[0]]["codes"][0]) for pair in pairs])
    ways = {}
    for name, join in JOINED.items():
        chances = softmax(join(front, back))
        own_chances = chances[np.arange(len(labels)), labels]
        ways[name] = {
            "top1": float((chances.argmax(1) == labels).mean()), "nll": float(-np.log(own_chances + 1e-12).mean()),
        }  # fmt: skip
    shipped = both_sides_metrics(SidePairs(labels, front, back))
    print(json.dumps({"seed": options.seed, "temperature": models.temperature, **shipped, "ways": ways}))


if __name__ == "__main__":
    main()
