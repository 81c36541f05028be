"""Predictions of a trained run for any photos."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pillsnap.errors import UserError
from pillsnap.evaluate.inference import infer
from pillsnap.manifest.table import read_manifest
from pillsnap.photos.decode import PHOTO_SUFFIXES
from pillsnap.runs.directory import Run
from pillsnap.storage import local_manifest


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


def predict_photos(run: Run, photos: Sequence[Path], *, single: bool = False) -> list[dict[str, Any]]:
    """One entry per photo, in order: `path`, `error` (None when it could be read) and `pills`, best first. Ray must be
    initialised.

    A pill has `box` (x, y, w, h in pixels), `score` of the detector, `code`, `name`, `edi_codes`, `confidence`
    (calibrated on the validation split) and `top5`. With `single` only the pill of the highest score is returned.
    """
    root = os.path.commonpath([photo.parent for photo in photos])
    paths = [os.path.relpath(photo, root) for photo in photos]
    return _predict(run, [str(photo) for photo in photos], paths, root, single)


def predict_manifest_photos(
    run: Run, manifest_path: str | Path, data_root: str | None, split: str | None, *, single: bool = False
) -> list[dict[str, Any]]:
    """Like `predict_photos`, for the photos of a manifest (of one `split`, unless None) under `data_root` (default: the
    run's). Raises UserError when there is none.
    """
    manifest = read_manifest(local_manifest(manifest_path))
    if split is not None:
        manifest = manifest.filter(pc.equal(manifest["split"], split))
    if not len(manifest):
        raise UserError(f"{manifest_path} has no photo" + (f" of the split {split!r}." if split else "."))
    names, locations = (manifest[name].to_pylist() for name in ("image_path", "location"))
    return _predict(run, names, locations, data_root or run.data_root, single)


def _predict(run: Run, names: list[str], locations: list[str], root: str, single: bool) -> list[dict[str, Any]]:
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
    found = infer(table, run.where, run.settings, run.codes, root, min_score=confidence)
    rows = {row["sample_id"]: row for row in found}
    return [_entry(run, rows[name], single) for name in names]


def _entry(run: Run, row: dict[str, Any], single: bool) -> dict[str, Any]:
    named = row["named_top"] or []
    pills = []
    for box, score, indices, probabilities in zip(
        row["boxes"] or [], row["scores"] or [], named, row["named_probs"] or [], strict=False
    ):
        best = run.classes[indices[0]]
        pills.append(
            {
                "box": [round(value, 1) for value in box],
                "score": round(score, 4),
                "code": best.code,
                "name": best.name,
                "edi_codes": best.edi_codes,
                "confidence": round(probabilities[0], 4),
                "top5": [
                    {"code": run.codes[i], "confidence": round(p, 4)}
                    for i, p in zip(indices, probabilities, strict=True)
                ],
            }
        )
    return {"path": row["sample_id"], "error": row["error"], "pills": pills[:1] if single else pills}
