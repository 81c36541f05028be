"""Do short epochs reach the targets? 18 whole epochs beside a share of their passes, on pills told apart by imprints.

    python -m benchmarks.short_epochs --out DIR --task T [--passes 1.0] [--epochs 18] [--combinations S] [--seed S]
        [--whole] [--set KEY=VALUE ...]

Photos as in benchmarks.imprints, split by group. One process trains with the real loop, order, augmentation and
checkpoints; windows are decoded once and kept in memory: those to train on as `data.store` keeps them (`--set`), those
to validate on from their photos. Prints photo passes and the metrics of all validation samples after the last epoch.
Killed, the same command continues.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from benchmarks.imprints import COMBINATIONS, VIEWS_PER_CLASS, prepare
from pillsnap.config import load_settings
from pillsnap.data.recipes import Recipe
from pillsnap.data.sources import FetchTimes, Source
from pillsnap.data.windows import Codec, Window, whole
from pillsnap.photos.decode import BadImage, Scale
from pillsnap.train.schedule.epochs import stream_plan
from tests.reliability.harness import LoopRun

WHOLE_EPOCHS = 18
SETTINGS: dict[str, dict[str, Any]] = {
    "detection": {"model": "yolo11n", "image_size_px": 96, "lr": 2e-3, "batch_size": 16},
    "classification": {"model": "tf_efficientnet_lite0", "image_size_px": 80, "lr": 1e-3, "drop_rate": 0.2},
}


class KeptSource(Source):
    """Windows kept in memory: of the photos, or of a store whose windows `codec` encodes."""

    def start(self, recipe: Recipe, train: pa.Table, codec: Codec | None = None, whole: bool = False) -> None:
        self.recipe, self.train, self.codec, self.whole = recipe, train, codec, whole
        self.kept: dict[tuple[bool, str], Window | BadImage] = {}

    def window(self, samples: pa.Table, number: int, times: FetchTimes, needed: Scale = whole) -> Window | BadImage:
        key = samples is self.train, samples["sample_id"][number].as_py()
        if key not in self.kept:
            found: Any = super().window(samples, number, times, whole if self.whole else needed)
            if not isinstance(found, BadImage):
                codec = self.codec if key[0] else None
                found = self.recipe.cut(found, samples, number, key[0], codec or "png")
                found = found.encode(codec).decode(0) if codec else replace(found, pixels=found.pixels.copy())
            self.kept[key] = found
        return self.kept[key]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the photos and the runs")
    parser.add_argument("--task", choices=SETTINGS, required=True)
    parser.add_argument("--passes", type=float, default=1.0, help="share of the passes of 18 whole epochs")
    parser.add_argument("--epochs", type=int, default=WHOLE_EPOCHS)
    parser.add_argument("--combinations", type=float, help="detection.combination_share")
    parser.add_argument("--weights", default="random", help="file of the classifier's initial weights")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--classes", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--whole", action="store_true", help="decode photos whole, not at the size of use")
    parser.add_argument("--set", action="append", default=[], help="any setting, such as train.schedule=wsd")
    options = parser.parse_args()
    scale = options.classes / 200
    prepare(options.out, options.classes, VIEWS_PER_CLASS, round(COMBINATIONS * scale))
    name, passes = options.task, options.passes
    settings = load_settings(
        "demo",
        {f"{name}.{key}": value for key, value in SETTINGS[name].items()}
        | {
            f"{name}.epochs": options.epochs, f"{name}.validate_every": options.epochs, f"{name}.warmup_epochs": 1,
            f"{name}.weights": options.weights, "train.seed": options.seed, "train.log_every_steps": 100,
            "wandb.mode": "disabled", "train.amp": "off",
        }
        | ({"detection.combination_share": options.combinations} if name == "detection" else {}),
        tuple(options.set),
    )  # fmt: skip
    parts = [name, f"{passes:.3f}", options.epochs, options.combinations, options.seed, *options.set]
    parts += ["whole"] * options.whole
    folder = options.out / "-".join(map(str, parts))
    folder.mkdir(exist_ok=True)
    run = LoopRun(folder, name, settings, options.out / "run" / "manifest.parquet", options.out / "photos")
    torch.set_num_threads(options.threads)
    own = getattr(settings, name)
    if passes < 1:
        per_epoch = passes * WHOLE_EPOCHS * len(run.samples.train) / options.epochs
        whole_steps = max(1, round(per_epoch / own.batch_size)) * own.batch_size
        own = own.model_copy(update={"samples_per_epoch": whole_steps})
    run.plan = stream_plan(own, options.seed, run.samples)
    run.source = KeptSource(run.source.reader)
    store = settings.data.store
    run.source.start(run.task.recipe(run.samples), run.samples.train, None if store == "off" else store, options.whole)
    started_s = time.monotonic()
    run.train()
    ended = run.events("validation")[-1]
    print(json.dumps({
        "task": name, "seed": options.seed, "passes": run.plan.epochs * run.plan.epoch_samples,
        "samples": run.plan.num_train, "epochs": run.plan.epochs, "combinations_per_epoch":
        run.plan.combinations_per_epoch, "validated": run.plan.num_val, "metrics": ended["metrics"],
        "last_loss": run.events("epoch")[-1]["loss"], "session_s": round(time.monotonic() - started_s),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
