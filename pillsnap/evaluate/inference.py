"""Two-stage inference over a manifest in one pass: Ray Data tasks decode, actors run both models."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pillsnap.config import Settings
from pillsnap.data.windows import Photo, Window, frame_scale
from pillsnap.metrics.boxes import MIN_SCORE
from pillsnap.metrics.calibration import temperature_facts
from pillsnap.metrics.evidence import Evidence
from pillsnap.metrics.limits import Limits
from pillsnap.observe.work_progress import Progress, unseen
from pillsnap.photos.decode import BadImage, is_reducible
from pillsnap.photos.reader import PhotoReader, ReadAhead
from pillsnap.runs.enrolled import Enrolled

if TYPE_CHECKING:
    from pillsnap.evaluate.two_stage import Names

UNKNOWN = -1
"""Label of a pill whose class was not trained."""
FLOATS, DOUBLES, INTS = pa.list_(pa.float32()), pa.list_(pa.float64()), pa.list_(pa.int64())
_DECODED = (
    ("pixels", pa.large_binary()),
    ("shape", pa.list_(pa.int64())),
    ("reduction", pa.int64()),
    ("data", pa.large_binary()),
    ("error", pa.string()),
)
_RESULT = pa.schema(
    {
        "sample_id": pa.string(),
        "image_type": pa.string(),
        "error": pa.string(),
        "boxes": pa.list_(FLOATS),
        "scores": FLOATS,
        "named_top": pa.list_(INTS),
        "named_probs": pa.list_(FLOATS),
        "named_raw": FLOATS,
        "named_unaided": INTS,
        "named_unaided_probs": FLOATS,
        "named_forbidden": FLOATS,
        "named_known": DOUBLES,
        "box_index": INTS,
        "label": INTS,
        "top_indices": pa.list_(INTS),
        "top_probs": pa.list_(FLOATS),
        "raw": FLOATS,
        "calibration_facts": pa.list_(FLOATS),
        **dict.fromkeys(("features", "named_features", "logits", "named_logits"), pa.list_(pa.binary())),
        "known": DOUBLES,
        "temperature": pa.float64(),
    }
)


def infer(
    photos: pa.Table,
    run: str | Path,
    settings: Settings,
    codes: list[str],
    data_root: str,
    *,
    detect: bool = True,
    classify: bool = True,
    min_score: float = MIN_SCORE,
    evidence: Evidence | None = None,
    features: bool = False,
    limits: Limits | None = None,
    logits_of: Collection[str] = (),
    enrolled: Enrolled | None = None,
    progress: Progress = unseen,
) -> list[dict[str, Any]]:
    """One row per photo with the output of both models; `photos` has manifest columns. Ray must be initialised.

    Detections below `min_score` are left out; metrics need nearly all of them. With `features` also the classifier's
    features of each crop, and for the sample ids of `logits_of` its logits before the temperature, as the bytes of
    float32; with `limits`, unless they are of another classifier, the likeness of each crop to the trained classes.
    `enrolled` drugs are the last of `codes`.
    """
    import ray
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    batch_size = settings.evaluation.batch_size
    num_gpus = int(ray.cluster_resources().get("GPU", 0)) if settings.train.device != "cpu" else 0
    columns = photos.select(["sample_id", "location", "image_type", "codes", "boxes"]).combine_chunks()
    blocks = [columns.slice(start, batch_size) for start in range(0, len(columns), batch_size)]
    decoded = ray.data.from_arrow(blocks).map_batches(
        _decode,
        fn_kwargs={
            "reader": PhotoReader(data_root, settings.data.max_pixels),
            "size_px": settings.detection.image_size_px,
        },
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=settings.data.decoding_cpus / 2,
    )
    with warnings.catch_warnings():
        # max_restarts=0: with restarts Ray logs an error about actor arguments that may be lost.
        warnings.simplefilter("ignore", DeprecationWarning)
        inferred = decoded.map_batches(
            _Model,
            fn_constructor_args=(run, settings, codes),
            fn_constructor_kwargs={
                "detect": detect,
                "classify": classify,
                "min_score": min_score,
                "evidence": evidence,
                "features": features,
                "logits_of": frozenset(logits_of),
                "limits": limits,
                "enrolled": enrolled,
            },
            batch_size=batch_size,  # Ray demands a number of actors with GPUs
            batch_format="pyarrow",
            num_gpus=1 if num_gpus else 0,
            num_cpus=settings.train.cpus_per_worker,
            max_restarts=0,
            compute=ray.data.ActorPoolStrategy(size=max(1, min(num_gpus or 1, math.ceil(len(columns) / batch_size)))),
        )
    rows: list[dict[str, Any]] = []
    for batch in inferred.iter_batches(batch_size=None, batch_format="pyarrow"):
        rows += batch.to_pylist()
        progress(len(rows), len(photos))
    return rows


def _decode(batch: pa.Table, *, reader: PhotoReader, size_px: int) -> pa.Table:
    """Adds each photo's `pixels` at the size that detection needs, their `shape` and `reduction`, the `data` of a JPEG,
    whose crops may need another size, and the `error` of a photo that cannot be read.
    """
    import cv2

    cv2.setNumThreads(1)
    rows: list[tuple[bytes, tuple[int, ...], int, bytes, str | None]] = []
    locations = batch["location"].to_pylist()
    photos = ReadAhead(reader, locations)
    for location in locations:
        data = photos.read_bytes(location)
        try:
            if isinstance(data, BadImage):
                raise data
            window = Photo(data, reader.max_pixels).window(frame_scale(size_px))
            kept = data if is_reducible(data) else b""
            rows.append((window.pixels.tobytes(), window.pixels.shape, round(1 / window.scale_x), kept, None))
        except BadImage as error:
            rows.append((b"", (0, 0, 3), 1, b"", str(error)))
    columns = zip(*rows, strict=True)
    for (name, kind), values in zip(_DECODED, columns, strict=True):
        batch = batch.append_column(name, pa.array(values, kind))
    return batch


class _Model:
    """Actor with both models."""

    def __init__(
        self,
        run: str | Path,
        settings: Settings,
        codes: list[str],
        detect: bool,
        classify: bool,
        min_score: float,
        evidence: Evidence | None = None,
        features: bool = False,
        logits_of: frozenset[str] = frozenset(),
        limits: Limits | None = None,
        enrolled: Enrolled | None = None,
    ) -> None:
        import os

        import torch

        from pillsnap.evaluate.two_stage import TwoStage
        from pillsnap.models.precision import this_device

        if this_device(settings.train.device).type == "cpu":
            torch.set_num_threads(os.cpu_count() or 1)
        self._settings = settings
        self._min_score = min_score
        self._features, self._logits_of = features, logits_of
        self._labels = {code: index for index, code in enumerate(codes)}
        self._models = TwoStage(
            run, settings, codes, detect=detect, classify=classify, evidence=evidence, enrolled=enrolled
        )
        self._limits = limits if limits is not None and limits.model == self._models.weights_sha256 else None

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = batch.drop_columns(["pixels", "data"]).to_pylist()
        results: list[dict[str, Any]] = [
            dict.fromkeys(_RESULT.names)
            | {"sample_id": row["sample_id"], "image_type": row["image_type"], "error": row["error"]}
            for row in rows
        ]
        readable = [i for i, row in enumerate(rows) if not row["error"]]
        photos = [self._photo(batch, i, rows[i]) for i in readable]
        if photos and self._models.detector is not None:
            self._detect(photos, [results[i] for i in readable])
        if photos and self._models.classifier is not None:
            self._classify(photos, [rows[i] for i in readable], [results[i] for i in readable])
        return pa.Table.from_pylist(results, _RESULT)

    def _photo(self, batch: pa.Table, index: int, row: dict[str, Any]) -> Photo:
        pixels = np.frombuffer(batch["pixels"][index].as_buffer(), np.uint8).reshape(row["shape"])
        scale = 1 / row["reduction"]
        decoded = {row["reduction"]: Window(pixels, scale_x=scale, scale_y=scale)}
        return Photo(batch["data"][index].as_py(), self._settings.data.max_pixels, decoded)

    def _detect(self, photos: list[Photo], results: list[dict[str, Any]]) -> None:
        for result, found in zip(results, self._models.detect(photos, self._min_score), strict=True):
            result["boxes"], result["scores"] = found.boxes.tolist(), found.scores.tolist()

    def _classify(self, photos: list[Photo], rows: list[dict[str, Any]], results: list[dict[str, Any]]) -> None:
        labelled = [
            [(i, self._labels.get(code, UNKNOWN), box)
             for i, (code, box) in enumerate(zip(row["codes"], row["boxes"], strict=True))
             if box is not None and (code in self._labels or self._limits is not None)]
            for row in rows
        ]  # fmt: skip
        found = [self._confident_boxes(result) for result in results]
        boxes = [
            np.array([*(box for _, _, box in pills), *confident], np.float32).reshape(-1, 4)
            for pills, confident in zip(labelled, found, strict=True)
        ]
        classified = self._models.classify(photos, boxes)
        both = [
            (names.rows(slice(0, len(pills))), names.rows(slice(len(pills), None)))
            for names, pills in zip(classified, labelled, strict=True)
        ]
        facts = iter(self._calibration_facts([given for given, _ in both], labelled))
        for result, pills, (given, named) in zip(results, labelled, both, strict=True):
            result["temperature"] = self._models.temperature
            result["box_index"] = [i for i, _, _ in pills]
            result["label"] = [label for _, label, _ in pills]
            result["top_indices"], result["top_probs"], result["raw"] = _lists(given)
            result["calibration_facts"] = [next(facts) for _ in pills]
            if self._limits is not None:
                likeness = self._limits.likeness
                result["known"], result["named_known"] = (likeness(n.features).tolist() for n in (given, named))
            for name, kept in (("features", self._features), ("logits", result["sample_id"] in self._logits_of)):
                if kept:
                    result[name], result[f"named_{name}"] = ([*map(bytes, getattr(n, name))] for n in (given, named))
            if self._models.detector is not None:
                result["named_top"], result["named_probs"], result["named_raw"] = _lists(named)
                for name in ("unaided", "unaided_probs", "forbidden"):
                    result[f"named_{name}"] = getattr(named, name).tolist()

    def _calibration_facts(self, given: list[Names], labelled: list[list[Any]]) -> list[list[float]]:
        """Of the labelled crops of all photos: at once, as there are some hundred small operations."""
        import torch

        # What those of an UNKNOWN pill are, does not matter.
        labels = torch.tensor([label for pills in labelled for _, label, _ in pills], dtype=torch.long).clamp(min=0)
        logits = torch.from_numpy(np.concatenate([names.logits for names in given]))
        device = self._models.device
        return temperature_facts(logits.to(device), labels.to(device)).tolist()

    def _confident_boxes(self, result: dict[str, Any]) -> list[list[float]]:
        """The boxes to classify: those at or above the confidence threshold, a prefix of all found boxes."""
        scored = zip(result["boxes"] or [], result["scores"] or [], strict=True)
        return [box for box, score in scored if score >= self._settings.evaluation.confidence]


def _lists(names: Names) -> tuple[list[list[int]], list[list[float]], list[float]]:
    return names.top.tolist(), names.probs.tolist(), names.raw.tolist()
