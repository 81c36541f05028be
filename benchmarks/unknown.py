"""Does an answer keep its stated risk, and which score tells known pills from unknown ones?

    python -m benchmarks.unknown --out DIR [--data DIR] [--share 0.2] [--passes 0.333] [--size 72] [--seed S]

Photos as in benchmarks.imprints, split by group; a share of the classes is left out of training (by seed). One process
trains a classifier with the real loop (Ray takes no part), and keeps logits and pooled features of all crops in
DIR/seed-S.npz; run again, the same command starts from that file.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from benchmarks.imprints import COMBINATIONS, VIEWS_PER_CLASS, prepare
from benchmarks.short_epochs import SETTINGS, WHOLE_EPOCHS, KeptSource
from benchmarks.unknown_scores import Fitted, scores
from pillsnap.config import Settings, load_settings
from pillsnap.config.settings import EvaluationSettings
from pillsnap.data import augment
from pillsnap.data.recipes import NO_CROP_JITTER
from pillsnap.data.samples import classification_samples
from pillsnap.evaluate.answers import judge
from pillsnap.evaluate.inference import UNKNOWN
from pillsnap.evaluate.predictions import Predictions
from pillsnap.export.pipeline import softmax
from pillsnap.manifest.selection.unknown_classes import choose_unknown, leave_out
from pillsnap.manifest.table import class_list, read_classes, read_manifest, write_manifest
from pillsnap.metrics.calibration import (
    NUM_FOLDS,
    best_temperature,
    cross_fitted_confidence,
    folds_of,
    temperature_facts,
)
from pillsnap.metrics.likeness import fit_likeness
from pillsnap.metrics.limits import Limits
from pillsnap.metrics.selective import auroc, lower_limit
from pillsnap.models.classifier import input_statistics, normalise
from pillsnap.photos.reader import PhotoReader
from pillsnap.tasks.best_model import load_best
from pillsnap.train.schedule.epochs import stream_plan
from tests.reliability.harness import LoopRun


def train(folder: Path, root: Path, settings: Settings, passes: float, threads: int) -> None:
    """Train the classifier of the manifest in `folder`, or continue that."""
    run = LoopRun(folder, "classification", settings, folder / "manifest.parquet", root)
    torch.set_num_threads(threads)
    own = settings.classification
    per_epoch = passes * WHOLE_EPOCHS * len(run.samples.train) / own.epochs
    own = own.model_copy(update={"samples_per_epoch": max(1, round(per_epoch / own.batch_size)) * own.batch_size})
    run.plan = stream_plan(own, settings.train.seed, run.samples)
    run.source = KeptSource(run.source.reader)
    run.source.start(run.task.recipe(run.samples), run.samples.train)
    run.train()


@torch.inference_mode()
def outputs(folder: Path, root: Path, settings: Settings, codes: list[str], samples: pa.Table) -> dict[str, np.ndarray]:
    """Logits and pooled features of the crops of `samples`, unjittered."""
    best = load_best(folder, "classification", settings, codes)
    assert best is not None
    model: Any = best.model
    reader: Any = PhotoReader(str(root), settings.data.max_pixels)
    rng = np.random.default_rng(0)
    own, statistics = settings.classification, input_statistics(model)
    found: dict[str, list[np.ndarray]] = {"logits": [], "features": []}
    for start in range(0, len(samples), 64):
        rows = samples.slice(start, 64).to_pylist()
        crops = [
            augment.crop(reader.read(row["location"]), np.array(row["box"], np.float32), own.image_size_px,
                         own.crop_margin, NO_CROP_JITTER, rng)
            for row in rows
        ]  # fmt: skip
        maps = model.forward_features(normalise(torch.from_numpy(np.stack(crops)), *statistics))
        features = model.forward_head(maps, pre_logits=True)
        found["features"].append(features.numpy())
        found["logits"].append(model.get_classifier()(features).numpy())
    return {name: np.concatenate(parts) for name, parts in found.items()}


def collect(options: argparse.Namespace) -> dict[str, np.ndarray]:
    """Arrays of train, val and unknown crops: logits, features, labels, groups; made once."""
    path = options.out / f"seed-{options.seed}.npz"
    if path.exists():
        return dict(np.load(path))
    folder = options.out / f"run-{options.seed}"
    whole = read_manifest(options.data / "run" / "manifest.parquet")
    unknown = choose_unknown(whole, options.share, options.seed)
    known = whole if options.pills else leave_out(whole, unknown)
    names = {entry.code: entry.name for entry in read_classes(options.data / "run")}
    if not (folder / "manifest.parquet").exists():
        classes = [entry for entry in class_list(known, names) if entry.code not in unknown]
        write_manifest(known, folder, [replace(entry, index=index) for index, entry in enumerate(classes)], unknown)
    codes = [entry.code for entry in read_classes(folder)]
    own = SETTINGS["classification"] | {"image_size_px": options.size}
    settings = load_settings(
        "demo",
        {f"classification.{key}": value for key, value in own.items()}
        | {
            "classification.epochs": WHOLE_EPOCHS, "classification.validate_every": WHOLE_EPOCHS,
            "classification.warmup_epochs": 1, "classification.weights": options.weights, "train.seed": options.seed,
            "train.log_every_steps": 100, "wandb.mode": "disabled", "train.amp": "off",
        },
    )  # fmt: skip
    started_s = time.monotonic()
    root = options.data / "photos"
    train(folder, root, settings, options.passes, options.threads)
    print(f"trained in {time.monotonic() - started_s:.0f} s", flush=True)
    samples = classification_samples(known, codes)
    left_out = classification_samples(known, unknown)
    groups = dict(zip(*(known[name].to_pylist() for name in ("sample_id", "group")), strict=True))
    arrays: dict[str, np.ndarray] = {"codes": np.array(codes), "unknown_codes": np.array(unknown)}
    judged = pa.concat_tables([left_out.train, left_out.val])
    for name, table in (("train", samples.train), ("val", samples.val), ("unknown", judged)):
        arrays |= {f"{name}_{key}": value for key, value in outputs(folder, root, settings, codes, table).items()}
        arrays[f"{name}_labels"] = table["label"].to_numpy()
        arrays[f"{name}_groups"] = np.array([groups[photo] for photo in table["photo_id"].to_pylist()])
        arrays[f"{name}_ids"] = np.array(table["sample_id"].to_pylist())
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return arrays


def answered(arrays: dict[str, np.ndarray], max_wrong: float) -> dict[str, Any]:
    """`answers` of metrics.json (evaluate/answers.py) of these crops."""
    fitted = fit_likeness("", *(arrays[f"train_{name}"] for name in ("features", "labels", "groups")))
    logits, labels = (torch.from_numpy(arrays[f"val_{name}"]) for name in ("logits", "labels"))
    facts = temperature_facts(logits, labels).numpy()
    crops = _table(arrays, "val", fitted, best_temperature(facts))
    held_out = cross_fitted_confidence(facts, arrays["val_groups"])
    crops = crops.set_column(crops.column_names.index("held_out_confidence"), "held_out_confidence", pa.array(held_out))
    unknown = _table(arrays, "unknown", fitted, best_temperature(facts))
    groups = pa.table({"sample_id": crops["sample_id"], "group": arrays["val_groups"].tolist()})
    predictions = Predictions(None, crops, None, {}, unknown=unknown)
    return judge(predictions, groups, fitted, EvaluationSettings(max_wrong=max_wrong))[1]


def _table(arrays: dict[str, np.ndarray], name: str, fitted: Limits, temperature: float) -> pa.Table:
    logits = arrays[f"{name}_logits"].astype(np.float64)
    return pa.table(
        {
            "sample_id": arrays[f"{name}_ids"].tolist(),
            "label": arrays[f"{name}_labels"] if name == "val" else np.full(len(logits), UNKNOWN),
            "top_indices": np.argsort(-logits, axis=1)[:, :5].tolist(),
            "raw_confidence": softmax(logits).max(1),
            "held_out_confidence": softmax(logits / temperature).max(1),
            "known": fitted.likeness(arrays[f"{name}_features"]),
        }
    )


def compared(arrays: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """For each score the AUROC of known against unknown crops and the share of unknown ones that are accepted with 99 %
    of the known; fitted to training crops, and to the validation crops of other groups (in five parts).
    """
    parts = {
        name: Fitted(
            arrays[f"{name}_logits"].astype(np.float64), arrays[f"{name}_features"].astype(np.float64),
            arrays[f"{name}_labels"],
        )
        for name in ("train", "val", "unknown")
    }  # fmt: skip
    val, unknown = parts["val"], parts["unknown"]
    found: dict[str, list[float]] = {}
    for name, score in scores(parts["train"]).items():
        found[name] = _told(score(val.logits, val.features), score(unknown.logits, unknown.features))
    folds = folds_of(arrays["val_groups"])
    held_out = {name: np.zeros(len(folds)) for name in found}
    foreign: dict[str, list[np.ndarray]] = {name: [] for name in found}
    for fold in range(NUM_FOLDS):
        inside = folds == fold
        others = Fitted(val.logits[~inside], val.features[~inside], val.labels[~inside])
        for name, score in scores(others).items():
            held_out[name][inside] = score(val.logits[inside], val.features[inside])
            foreign[name].append(score(unknown.logits, unknown.features))
    for name, values in held_out.items():
        found[name] += _told(values, np.median(foreign[name], axis=0))
    return found


def _told(known: np.ndarray, unknown: np.ndarray) -> list[float]:
    return [round(auroc(known, unknown), 4), round(float((unknown >= lower_limit(known, 0.99)).mean()), 4)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="folder of the photos and the manifest; made if missing")
    parser.add_argument("--share", type=float, default=0.2, help="share of the classes that are left out")
    parser.add_argument("--pills", action="store_true", help="leave out pills instead of photos")
    parser.add_argument("--passes", type=float, default=0.333)
    parser.add_argument("--size", type=int, default=72)
    parser.add_argument("--weights", default="random", help="file of the initial weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--classes", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    options.data = options.data or options.out / "data"
    options.out.mkdir(parents=True, exist_ok=True)
    prepare(options.data, options.classes, VIEWS_PER_CLASS, round(COMBINATIONS * options.classes / 200))
    arrays = collect(options)
    right = {name: arrays[f"{name}_logits"].argmax(1) == arrays[f"{name}_labels"] for name in ("train", "val")}
    print(json.dumps({
        "seed": options.seed, "top1": {name: float(hits.mean()) for name, hits in right.items()},
        "crops": {name: len(arrays[f"{name}_labels"]) for name in ("train", "val", "unknown")},
        "val_groups": len(np.unique(arrays["val_groups"])),
    }))  # fmt: skip
    for max_wrong in (0.01, 0.02, 0.05):
        found = answered(arrays, max_wrong)
        print(json.dumps({name: value for name, value in found.items() if name != "risk_coverage"}))
    print(json.dumps({"risk_coverage": found["risk_coverage"]}))
    print(f"{'':36}fitted to training: AUROC, unknown accepted; to validation")
    for name, figures in compared(arrays).items():
        print(f"{name:36}{'   '.join(f'{figure:.4f}' for figure in figures)}")


if __name__ == "__main__":
    main()
