"""Predictions of a trained run for any photos."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pillsnap.errors import UserError
from pillsnap.evaluate.both_sides import calibrated, pairs_of
from pillsnap.evaluate.inference import infer
from pillsnap.manifest.aihub import parse_name
from pillsnap.manifest.table import read_manifest
from pillsnap.metrics.evidence import Evidence, both_sides, gather, read_allowed
from pillsnap.metrics.limits import Limits, answer_of, read_limits
from pillsnap.photos.decode import PHOTO_SUFFIXES
from pillsnap.runs.directory import Run
from pillsnap.storage import local_manifest

TOP = 5
_UNAIDED = ("named_unaided", "named_unaided_probs", "named_forbidden")


def list_photos(paths: Sequence[Path]) -> list[Path]:
    """Absolute paths of the given photos and of those in the given folders. Raises UserError for a missing path, and
    OSError for a folder that cannot be read.
    """
    photos: list[Path] = []
    for path in paths:
        if path.is_dir():
            photos += sorted(
                Path(folder, name)
                for folder, _, names in os.walk(path, onerror=_raise)
                for name in names
                if name.lower().endswith(PHOTO_SUFFIXES) and os.path.isfile(os.path.join(folder, name))
            )
        elif path.is_file():
            photos.append(path)
        else:
            raise UserError(f"There is no photo or folder {path}.")
    if not photos:
        raise UserError(f"There is no photo in {', '.join(map(str, paths))}.")
    return [photo.absolute() for photo in photos]


def _raise(error: OSError) -> None:
    raise error


def predict_photos(
    run: Run,
    photos: Sequence[Path],
    *,
    single: bool = False,
    evidence: Evidence | None = None,
    pairs: str | None = None,
) -> list[dict[str, Any]]:
    """One entry per photo, in order: `path`, `error` (None when it could be read), `side` (front or back, if an AI Hub
    file name states it) and `pills`, best first. Ray must be initialised.

    A pill has `box` (x, y, w, h in pixels), `score` of the detector, `code`, `name`, `edi_codes`, `attributes`,
    `confidence` (calibrated on the validation split), `top5`, and the `answer` with its `reason` (Limits.answer); with
    `evidence` also what it says (Evidence.facts).
    With `single` only the pill of the highest score is returned. With `pairs`, a rule of `pairs_of`, the entries of a
    pair also have `both_sides`: the joint answer for the pill of the highest score in each of both photos, with the
    `path` of the other photo; None when one shows no pill.
    """
    root = os.path.commonpath([photo.parent for photo in photos])
    paths = [os.path.relpath(photo, root) for photo in photos]
    names = [parse_name(photo.name) for photo in photos]
    sides = [None if name is None else name.direction for name in names]
    return _predict(run, [str(photo) for photo in photos], paths, root, sides, single, evidence, pairs)


def predict_manifest_photos(
    run: Run,
    manifest_path: str | Path,
    data_root: str | None,
    split: str | None,
    *,
    single: bool = False,
    evidence: Evidence | None = None,
    pairs: str | None = None,
) -> list[dict[str, Any]]:
    """Like `predict_photos`, for the photos of a manifest (of one `split`, unless None) under `data_root` (default: the
    run's). Raises UserError when there is none.
    """
    manifest = read_manifest(local_manifest(manifest_path))
    if split is not None:
        manifest = manifest.filter(pc.equal(manifest["split"], split))
    if not len(manifest):
        raise UserError(f"{manifest_path} has no photo" + (f" of the split {split!r}." if split else "."))
    names, locations, sides = (manifest[name].to_pylist() for name in ("image_path", "location", "direction"))
    return _predict(run, names, locations, data_root or run.data_root, sides, single, evidence, pairs)


def evidence_for(run: Run, allow: Path | None = None, hints: Sequence[str] = ()) -> Evidence | None:
    """Evidence of a file of possible codes and of hints, if any. Raises UserError as `read_allowed` and `gather` do."""
    if allow is None and not hints:
        return None
    classes = [{"code": info.code, "attributes": info.attributes} for info in run.classes]
    return gather(classes, None if allow is None else read_allowed(allow, run.codes), hints)


def _predict(
    run: Run,
    names: list[str],
    locations: list[str],
    root: str,
    sides: list[int | None],
    single: bool,
    evidence: Evidence | None,
    rule: str | None,
) -> list[dict[str, Any]]:
    pairs = [] if rule is None else pairs_of(names, rule)
    table = pa.table(
        {
            "sample_id": names,
            "location": locations,
            "image_type": ["combination"] * len(names),
            "codes": pa.array([[] for _ in names], pa.list_(pa.string())),
            "boxes": pa.array([[] for _ in names], pa.list_(pa.list_(pa.float32()))),
        }
    )
    confidence = run.settings.evaluation.confidence
    limits = read_limits(run.run_dir)
    found = infer(
        table, run.where, run.settings, run.codes, root, min_score=confidence, evidence=evidence,
        logits_of=[names[index] for pair in pairs for index in pair], limits=limits, enrolled=run.enrolled,
    )  # fmt: skip
    rows = {row["sample_id"]: row for row in found}
    entries = [_entry(run, rows[name], side, single, evidence, limits) for name, side in zip(names, sides, strict=True)]
    for front, back in pairs:
        answer = _joint_answer(run, rows[names[front]], rows[names[back]], evidence, limits)
        for one, other in ((front, back), (back, front)):
            entries[one]["both_sides"] = answer and answer | {"path": names[other]}
    return entries


def _joint_answer(
    run: Run, front: dict[str, Any], back: dict[str, Any], evidence: Evidence | None, limits: Limits | None
) -> dict[str, Any] | None:
    if not front["named_logits"] or not back["named_logits"]:
        return None
    photos = (calibrated(row["named_logits"][0], row["temperature"])[None] for row in (front, back))
    logits = both_sides(*photos)[0]
    logits += 0 if evidence is None else evidence.log_ratios
    top = np.argsort(-logits, kind="stable")[: min(TOP, len(logits) if evidence is None else evidence.num_allowed)]
    shares = np.exp(logits - logits.max())
    known = front["named_known"] and min(row["named_known"][0] for row in (front, back))
    return _answer(run, top.tolist(), (shares[top] / shares.sum()).tolist(), limits, known)


def _entry(
    run: Run, row: dict[str, Any], side: int | None, single: bool, evidence: Evidence | None, limits: Limits | None
) -> dict[str, Any]:
    named = row["named_top"] or []
    pills = []
    for number, (box, score, indices, probabilities) in enumerate(
        zip(row["boxes"] or [], row["scores"] or [], named, row["named_probs"] or [], strict=False)
    ):
        known = row["named_known"] and row["named_known"][number]
        answer = _answer(run, indices, probabilities, limits, known)
        pills.append({"box": [round(value, 1) for value in box], "score": round(score, 4), **answer})
        if evidence is not None:
            index, confidence, forbidden = (row[name][number] for name in _UNAIDED)
            pills[-1] |= evidence.facts(indices[0], run.codes[index], confidence, forbidden)
    shown = {None: None, 0: "front", 1: "back"}.get(side)
    return {"path": row["sample_id"], "error": row["error"], "side": shown, "pills": pills[:1] if single else pills}


def _answer(
    run: Run, indices: Sequence[int], probabilities: Sequence[float], limits: Limits | None, known: float | None
) -> dict[str, Any]:
    best = run.classes[indices[0]]
    return {
        "code": best.code,
        "name": best.name,
        "edi_codes": best.edi_codes,
        "attributes": best.attributes,
        "confidence": round(probabilities[0], 4),
        "top5": [
            {"code": run.codes[i], "confidence": round(p, 4)} for i, p in zip(indices, probabilities, strict=True)
        ],
        **answer_of(limits, probabilities[0], known, enrolled=indices[0] >= run.num_trained),
    }
