"""Adds a drug to a trained run from a few photos, and measures what that changes for the trained drugs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pillsnap.data.samples import classification_samples
from pillsnap.data.windows import Photo
from pillsnap.errors import UserError
from pillsnap.evaluate.inference import infer
from pillsnap.evaluate.two_stage import TwoStage
from pillsnap.files import MISSING, write_atomically
from pillsnap.manifest.table import ClassInfo, check_code
from pillsnap.metrics.limits import read_limits
from pillsnap.models.imprinting import Crops, Imprinter
from pillsnap.photos.decode import BadImage
from pillsnap.photos.reader import PhotoReader
from pillsnap.runs.directory import Run
from pillsnap.runs.enrolled import ENROLLED_FILE, Enrolled, read_enrolled, write_enrolled

MAX_PHOTOS = 10
MAX_CROPS = 10_000
"""Validation crops that an enrolment is measured on, stratified by class."""
FEATURES_FILE = ".validation-features.safetensors"  # stays on this node
_ABOVE = 1e-3
"""Margin of a trained logit that is to stay the highest, above rounding."""


@dataclass(frozen=True)
class Enrolment:
    """What an enrolment changes: top-1 on `num_crops` validation crops without enrolled drugs, `before`, and with all
    of them, `after`.
    """

    before: float
    after: float
    num_crops: int
    num_photos: int
    lowered: float
    """How much the logits of all enrolled drugs are lowered to keep the trained drugs' answers."""


def enrol_drug(
    run: Run, info: ClassInfo, photos: Sequence[Path], *, crops: bool = False, max_loss: float = 0.005
) -> Enrolment:
    """Add the drug `info` to the enrolled drugs of `run`, from 1 to MAX_PHOTOS photos that show it alone, or from
    `crops`, which show nothing else.

    All enrolled drugs together may be expected to take at most `max_loss` of crops like the validation crops from the
    trained classifier's right answers (with fewer than 1 / max_loss of these, none of them): the logits of all drugs
    are lowered as far as that needs. Raises UserError for a known code, a photo without exactly one pill, a run without
    limits, and when the new drug would take more by itself; nothing is written then.
    """
    check_code(info.code, "pillsnap enrol")
    enrolled = read_enrolled(run.run_dir)
    if info.code in run.codes:
        raise UserError(f"{info.code} is one of the {len(run.codes):,} trained drugs: it needs no enrolment.")
    if enrolled is not None and info.code in enrolled.codes:
        raise UserError(f"{info.code} is enrolled: `pillsnap enrol --run {run.where} --remove {info.code}` first.")
    if not 1 <= len(photos) <= MAX_PHOTOS:
        raise UserError(f"{info.code}: {len(photos)} photos given; a drug is enrolled from 1 to {MAX_PHOTOS}.")
    models = TwoStage(run.where, run.settings, run.codes)
    if models.classifier is None:
        raise UserError(f"{run.where} has no trained classifier: train it first.")
    if isinstance(models.classifier.get_classifier(), tuple):
        raise UserError(
            f"{run.where}: {run.settings.classification.model} has two last layers; none can be enrolled to."
        )
    model = models.weights_sha256
    if enrolled is None:
        enrolled = Enrolled.none(models.classifier.head_hidden_size, model)
    enrolled.require(model, run.where)
    limits = read_limits(run.run_dir)
    if limits is None or limits.model != model:
        raise UserError(
            f"{run.where} has not been evaluated with its weights, and new drugs are compared with what that finds of "
            f"the trained ones: `pillsnap evaluate --run {run.where}` first."
        )
    features = _photo_features(run, models, photos, crops)
    known = _validation_crops(run, models)
    rows = Imprinter(known, models.temperature, limits.middle, limits.precision).rows(features)
    together, result = add_rows(enrolled, info, *rows, known, run.codes, max_loss)
    write_enrolled(run.run_dir, together)
    return result


def add_rows(
    enrolled: Enrolled,
    info: ClassInfo,
    weight: np.ndarray,
    bias: np.ndarray,
    known: Crops,
    codes: Sequence[str],
    max_loss: float,
) -> tuple[Enrolled, Enrolment]:
    """The `enrolled` drugs and one of the rows `weight` (photos, d) and `bias` (photos,), lowered as `enrol_drug` says,
    measured on the validation crops `known` of the trained `codes`. Raises UserError as it does.
    """
    right = known.logits.argmax(1) == known.labels
    best = known.logits.max(1)
    gaps = best - (known.features @ weight.T + bias).max(1)
    alone = right & (gaps < 0)
    if alone.mean() > max_loss:
        alike = codes[int(np.bincount(known.labels[alone]).argmax())]
        raise UserError(
            f"{info.code} is not enrolled: it would take {100 * alone.mean():.2f} % of {len(right):,} validation crops "
            f"from right answers, most of them from {alike}, and at most {100 * max_loss:g} % may be lost; give other "
            "photos, or raise --max-loss."
        )
    before = float(enrolled.lowered.max(initial=0))
    others = enrolled.logits(known.features).max(1, initial=-np.inf) + before
    nearest = np.sort(np.minimum(gaps, best - others)[right])
    # A share of (room + 1) / (crops + 1) of other crops like these is expected to be nearer than nearest[room].
    room = max(math.floor(max_loss * (len(right) + 1) + 1e-9) - 1, 0)
    lowered = max(before, _ABOVE - float(nearest[room])) if room < len(nearest) else before
    together = enrolled.with_drug(info, weight, bias, lowered)
    kept = right & (together.logits(known.features).max(1) <= best)
    return together, Enrolment(float(right.mean()), float(kept.mean()), len(right), len(weight), lowered)


def remove_drug(run: Run, code: str) -> None:
    """Remove an enrolled drug. If it was the last one enrolled, the file is that of before. Raises UserError when it is
    not enrolled.
    """
    enrolled = read_enrolled(run.run_dir)
    if enrolled is None:
        raise UserError(f"{code} is not enrolled: {run.where} has no {ENROLLED_FILE}.")
    write_enrolled(run.run_dir, enrolled.without(code))


def _photo_features(run: Run, models: TwoStage, photos: Sequence[Path], crops: bool) -> np.ndarray:
    """Features (photos, d) of the one pill of each photo."""
    if models.detector is None and not crops:
        raise UserError(f"{run.where} has no trained detector: give photos of single pills, cut out, with --crops.")
    found = []
    margin = run.settings.classification.crop_margin
    for path in photos:
        reader = PhotoReader(str(path.parent), run.settings.data.max_pixels)
        data = reader.read_bytes(path.name)
        pixels = reader.decode(data)
        if isinstance(data, BadImage) or isinstance(pixels, BadImage):
            raise UserError(f"{path}: cannot be read ({pixels}).")
        photo = Photo(data, reader.max_pixels)
        if crops:
            height, width = pixels.shape[:2]
            # The box whose margin ends at the borders.
            size = np.array([width, height]) / (1 + 2 * margin)
            boxes = np.array([[*((width, height) - size) / 2, *size]], np.float32)
        else:
            boxes = models.detect([photo], run.settings.evaluation.confidence)[0].boxes
        if len(boxes) != 1:
            raise UserError(
                f"{path}: the detector finds {len(boxes)} pills; give photos of exactly one, or cut it out and use "
                "--crops."
            )
        found.append(models.classify([photo], [boxes])[0].features[0])
    return np.stack(found)


def _validation_crops(run: Run, models: TwoStage) -> Crops:
    """Validation crops of the trained classes, their features computed once for each model and manifest."""
    from safetensors import SafetensorError
    from safetensors.numpy import load, save

    key = json.dumps([models.weights_sha256, run.manifest_hash]).encode()
    path = run.run_dir / FEATURES_FILE
    try:
        kept = load(path.read_bytes())
    except (*MISSING, SafetensorError):
        kept = {}
    if bytes(kept.get("key", b"")) != key:
        features, labels = _compute_features(run)
        kept = {"key": np.frombuffer(key, np.uint8), "features": features, "labels": labels}
        write_atomically(path, save(kept))
    return Crops(kept["features"], models.head(kept["features"]), kept["labels"])


def _compute_features(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Features (n, d) and labels (n,) of the validation crops at the label boxes."""
    from pillsnap.cluster.session import ray_session

    samples = classification_samples(run.manifest, run.codes, num_val=MAX_CROPS).val
    chosen = run.manifest.filter(pc.is_in(run.manifest["sample_id"], pa.array(samples["photo_id"].unique())))
    with ray_session():
        rows = infer(chosen, run.where, run.settings, run.codes, run.data_root, features=True)
    found = [pair for row in rows if row["features"] for pair in zip(row["features"], row["label"], strict=True)]
    labels = np.array([label for _, label in found], np.int64)
    if not len(labels) or np.bincount(labels).max() < 2:
        raise UserError(
            f"{run.where}: no drug has two readable validation crops with which to compare new ones; give a manifest "
            "with more validation photos to the training."
        )
    return np.stack([np.frombuffer(features, np.float32) for features, _ in found]), labels
