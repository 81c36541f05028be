"""Are drugs named that were never trained, from 1, 5 and 10 photos, and what do trained drugs lose?

    python -m benchmarks.enrolment FILE.npz [FILE.npz ...] [--drugs 20] [--draws 3]

Each file has features and logits of training and validation crops and of crops of classes left out of training, as
`benchmarks.unknown` keeps them. Validation crops are halved by photo group: one half scales the rows and bounds the
loss, the other one measures it. Drugs are tested on photos of other groups than those they were enrolled from. Other
rules are measured beside that of `pillsnap enrol`; without a bound, too.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pillsnap.errors import UserError
from pillsnap.evaluate.enrol import add_rows
from pillsnap.manifest.table import ClassInfo
from pillsnap.metrics.calibration import best_temperature, temperature_facts
from pillsnap.metrics.likeness import fit_likeness
from pillsnap.metrics.limits import Limits
from pillsnap.models.imprinting import Crops, Imprinter
from pillsnap.runs.enrolled import Enrolled

PHOTOS = (1, 5, 10)


class MeanDiscriminant(Imprinter):
    """One row per drug: the discriminant of the mean of its photos."""

    def _scores(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return super()._scores(features.mean(0, keepdims=True))


class Imprint(Imprinter):
    """One row per drug: its normalised mean (Qi et al., "Low-Shot Learning with Imprinted Weights", 2018)."""

    def _scores(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mean = _unit(_unit(features).mean(0, keepdims=True))
        return mean, np.zeros(1)


class Nearest(Imprinter):
    """One row per photo: its distance from the mean of the trained classes, normalised."""

    def _scores(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = _unit(features - self._mean)
        return rows, -rows @ self._mean


RULES = {"discriminant per photo (shipped)": Imprinter, "discriminant of the mean": MeanDiscriminant,
         "imprint of the mean": Imprint, "cosine per photo": Nearest}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--drugs", type=int, default=20)
    parser.add_argument("--draws", type=int, default=3, help="random choices of drugs and photos per file")
    parser.add_argument("--max-loss", type=float, default=0.005)
    options = parser.parse_args()
    files = [dict(np.load(file)) for file in options.files]
    limits = [fit_likeness("", *(each[f"train_{name}"] for name in ("features", "labels", "groups"))) for each in files]
    for rule in RULES:
        for num_photos in PHOTOS:
            for bound in (options.max_loss, 1.0):
                rows = [
                    enrol(arrays, trained, rule, num_photos, options.drugs, bound, draw)
                    for arrays, trained in zip(files, limits, strict=True)
                    for draw in range(options.draws)
                ]
                means = {name: round(float(np.mean([row[name] for row in rows])), 4) for name in rows[0]}
                spread = round(float(np.std([row["new"] for row in rows])), 4)
                print(json.dumps({"rule": rule, "photos": num_photos, "max_loss": bound, **means, "new_std": spread}))


def enrol(
    arrays: dict[str, np.ndarray],
    trained: Limits,
    rule: str,
    num_photos: int,
    num_drugs: int,
    max_loss: float,
    draw: int,
) -> dict[str, Any]:
    """Top-1 of old and new drugs together, of each, the loss of the old ones, seconds per drug without inference."""
    half = np.unique(arrays["val_groups"], return_inverse=True)[1] % 2 == draw % 2
    fit, measure = (
        Crops(*(arrays[f"val_{name}"][chosen] for name in ("features", "logits", "labels"))) for chosen in (half, ~half)
    )
    codes = arrays["codes"].tolist()
    temperature = best_temperature(temperature_facts(*map(torch.from_numpy, (fit.logits, fit.labels))).numpy())
    imprinter = RULES[rule](fit, temperature, trained.middle, trained.precision)
    imprinter.rows(fit.features[:num_photos])  # fits scale and offset, once for each number of photos
    features, labels, groups = (arrays[f"unknown_{name}"] for name in ("features", "labels", "groups"))
    rng = np.random.default_rng(draw)
    drugs = rng.permutation(np.unique(labels))[:num_drugs]
    enrolled = Enrolled.none(features.shape[1], "")
    tested, wanted, refused = [], [], 0
    started_s = time.perf_counter()
    for drug in drugs:
        crops = rng.permutation(np.flatnonzero(labels == drug))
        photos, rest = crops[:num_photos], crops[max(PHOTOS) :]
        tested.append(rest[~np.isin(groups[rest], groups[photos])])
        try:
            rows = imprinter.rows(features[photos])
            enrolled, _ = add_rows(enrolled, ClassInfo(str(drug), 0), *rows, fit, codes, max_loss)
            wanted.append(np.full(len(tested[-1]), len(codes) + len(enrolled.classes) - 1))
        except UserError:
            refused += 1
            wanted.append(np.full(len(tested[-1]), -1))
    seconds = (time.perf_counter() - started_s) / len(drugs)
    chosen, targets = np.concatenate(tested), np.concatenate(wanted)

    def hits(logits: np.ndarray, features: np.ndarray, labels: np.ndarray) -> float:
        return float((np.concatenate([logits, enrolled.logits(features)], 1).argmax(1) == labels).mean())

    old = hits(measure.logits, measure.features, measure.labels)
    new = hits(arrays["unknown_logits"][chosen], features[chosen], targets)
    return {
        "all": (old * len(codes) + new * len(drugs)) / (len(codes) + len(drugs)), "new": new, "old": old,
        "loss": float((measure.logits.argmax(1) == measure.labels).mean()) - old, "refused": refused,
        "seconds": seconds,
    }  # fmt: skip


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


if __name__ == "__main__":
    main()
