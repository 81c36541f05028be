"""Names the pills of photos with exported models. Requires only onnxruntime, numpy, OpenCV and Pillow.

    python pipeline.py photo.png [photo.png ...] [--allow codes.txt] [--hint shape=round ...]
    python pipeline.py --pairs front.png back.png [front.png back.png ...]

`pillsnap export` copies this file, decode.py, which reads photos as training does, evidence.py, which combines an
answer with possible codes and hints, and limits.py, which decides whether a code is given, beside the models; their
settings and classes are in pipeline.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnxruntime

PADDING_GREY = 114
# Every number of pills is a shape of its own: by default cuDNN tries all its algorithms for it, and TensorRT builds an
# engine, for seconds or minutes.
_OPTIONS = {"CUDAExecutionProvider": ("CUDAExecutionProvider", {"cudnn_conv_algo_search": "HEURISTIC"})}
_TOO_SLOW = ("TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider")
Photo = bytes | np.ndarray
"""Bytes of a file, or pixels (height, width, 3) uint8 RGB."""
Examined = tuple[np.ndarray, np.ndarray, np.ndarray, list[float | None]]
"""Of the k pills of a photo: boxes (k, 4), scores (k,), calibrated logits (k, classes), likeness to trained classes."""


class Pipeline:
    """The two exported models of a folder."""

    def __init__(self, folder: str | Path, providers: list[Any] | None = None) -> None:
        self._folder = folder
        self.facts: dict[str, Any] = json.loads((Path(folder) / "pipeline.json").read_text(encoding="utf-8"))
        providers = providers or [
            _OPTIONS.get(name, name) for name in onnxruntime.get_available_providers() if name not in _TOO_SLOW
        ]
        self._detector, self._classifier = (
            onnxruntime.InferenceSession(str(Path(folder) / f"{name}.onnx"), providers=providers)
            for name in ("detector", "classifier")
        )
        self._last: tuple[bytes, dict[int, np.ndarray]] = b"", {}
        """The last photo, and its pixels by reduction."""

    def predict(self, photo: Photo, evidence: Any = None) -> list[dict[str, Any]]:
        """The pills of one photo, best box first: `box` (x, y, w, h in pixels), `score`, `code`, `name`, `edi_codes`,
        `attributes`, `confidence`, `top5`, the `answer` (code, unsure or unknown) and its `reason`; with `evidence`
        (of `evidence.gather`) also what it says. Raises BadImage for bytes that cannot be decoded.
        """
        return self.pills(self.examine(photo), evidence)

    def examine(self, photo: Photo) -> Examined:
        """What both models say of a photo. Raises BadImage for bytes that cannot be decoded."""
        boxes, scores = self.detect(photo)
        logits, features = self._outputs(photo, boxes, ["logits", "features"])
        known = [None] * len(boxes) if self.limits is None else self.limits.likeness(features).tolist()
        return boxes, scores, self._calibrated(logits), known

    def pills(self, examined: Examined, evidence: Any = None) -> list[dict[str, Any]]:
        """As `predict`, from what `examine` returned."""
        pills = []
        for box, score, logits, known in zip(*examined, strict=True):
            index, answer = self._answer(logits, evidence, known)
            pills.append({"box": [round(float(value), 1) for value in box], "score": round(float(score), 4), **answer})
            if evidence is not None:
                (unaided,) = softmax(logits[None])
                best, excluded = int(unaided.argmax()), np.isneginf(evidence.log_ratios)
                code = self.facts["classes"][best]["code"]
                pills[-1] |= evidence.facts(index, code, float(unaided[best]), float(unaided[excluded].sum()))
        return pills

    def both_sides(self, front: Examined, back: Examined, evidence: Any = None) -> dict[str, Any] | None:
        """The joint answer for the pill of the highest score in each of both photos, as `code` and the following fields
        of `predict`; None when one shows no pill.
        """
        from evidence import both_sides

        (_, _, front_logits, front_known), (_, _, back_logits, back_known) = front, back
        if not (len(front_logits) and len(back_logits)):
            return None
        known = [value for value in (front_known[0], back_known[0]) if value is not None]
        return self._answer(both_sides(front_logits[:1], back_logits[:1])[0], evidence, min(known, default=None))[1]

    def _answer(self, logits: np.ndarray, evidence: Any, known: float | None) -> tuple[int, dict[str, Any]]:
        """Index of the named class, and what is said of calibrated logits (classes,) and a likeness."""
        from limits import answer_of

        num_named = len(logits)
        if evidence is not None:
            logits, num_named = logits + evidence.log_ratios, evidence.num_allowed
        top = np.argsort(-logits, kind="stable")[: min(5, num_named)]
        (probabilities,) = softmax(logits[None])
        named = [self.facts["classes"][i] for i in top]
        return int(top[0]), {
            **named[0],
            "confidence": round(float(probabilities[top[0]]), 4),
            "top5": [
                {"code": entry["code"], "confidence": round(float(probabilities[i]), 4)}
                for entry, i in zip(named, top, strict=True)
            ],
            **answer_of(
                self.limits,
                float(probabilities[top[0]]),
                known,
                enrolled=bool(top[0] >= self.facts["classification"]["num_trained"]),
            ),
        }

    def detect(self, photo: Photo) -> tuple[np.ndarray, np.ndarray]:
        """Boxes (k, 4) x, y, w, h in pixels of the photo and scores (k,), best first."""
        facts = self.facts["detection"]
        size_px = facts["image_size_px"]
        photo, reduction = self._decoded(photo, lambda width, height: size_px / max(width, height))
        height, width = photo.shape[:2]
        scale = size_px / max(width, height)
        offset = np.array([size_px - width * scale, size_px - height * scale]) / 2
        matrix = np.array([[scale, 0, offset[0]], [0, scale, offset[1]], [0, 0, 1]])
        frame = _warp(photo, _shift(-0.5) @ matrix @ _shift(0.5), size_px, cv2.BORDER_CONSTANT)
        images = np.ascontiguousarray(frame.transpose(2, 0, 1)[None], np.float32) / 255
        corners, scores = (output[0] for output in self._detector.run(None, {"images": images}))
        kept = np.flatnonzero(scores >= facts["confidence"])
        kept = kept[np.argsort(-scores[kept], kind="stable")]
        if facts["suppress_overlaps"]:
            kept = kept[_distinct(corners[kept], facts["nms_iou"])]
        corners = (corners[kept].reshape(-1, 2, 2) - offset) / scale
        low, high = np.clip(corners, 0, (width, height)).transpose(1, 0, 2)
        return np.concatenate([low, high - low], axis=1) * reduction, scores[kept]

    def classify(self, photo: Photo, boxes: np.ndarray) -> np.ndarray:
        """Calibrated probabilities (k, classes) of the pills in the boxes (k, 4)."""
        return softmax(self.logits(photo, boxes))

    def logits(self, photo: Photo, boxes: np.ndarray) -> np.ndarray:
        """Logits divided by the temperature, (k, classes), of the pills in the boxes (k, 4)."""
        (logits,) = self._outputs(photo, boxes, ["logits"])
        return self._calibrated(logits)

    @cached_property
    def limits(self) -> Any:
        """Limits of the run's answers; None if it was exported before it was evaluated."""
        from limits import read_limits

        return read_limits(self._folder)

    def _calibrated(self, logits: np.ndarray) -> np.ndarray:
        return logits.astype(np.float64) / self.facts["classification"]["temperature"]

    def features(self, photo: Photo, boxes: np.ndarray) -> np.ndarray:
        """Pooled features (k, d) of the pills in the boxes (k, 4); not in models that earlier versions exported."""
        (features,) = self._outputs(photo, boxes, ["features"])
        return features

    def _outputs(self, photo: Photo, boxes: np.ndarray, names: list[str]) -> list[np.ndarray]:
        facts = self.facts["classification"]
        if not len(boxes):
            shapes = {output.name: output.shape[1] for output in self._classifier.get_outputs()}
            return [np.zeros((0, shapes[name]), np.float32) for name in names]
        size_px = facts["image_size_px"]
        crops = np.stack([self._crop(photo, box, size_px, facts["crop_margin"]) for box in boxes])
        images = (crops.astype(np.float32) / 255 - np.float32(facts["mean"])) / np.float32(facts["std"])
        return self._classifier.run(names, {"images": np.ascontiguousarray(images.transpose(0, 3, 1, 2))})

    def _crop(self, photo: Photo, box: np.ndarray, size_px: int, margin: float | None) -> np.ndarray:
        """A square around the box and `margin` of its longer side; without a margin, around the whole photo."""
        if margin is None:
            photo, _ = self._decoded(photo, lambda width, height: size_px / max(width, height))
            box, margin = np.array((0, 0, photo.shape[1], photo.shape[0])), 0.0
        else:
            side = max(box[2], box[3], 1.0) * (1 + 2 * margin)
            photo, reduction = self._decoded(photo, lambda width, height: size_px / side)
            box = box / reduction
        x, y, width, height = map(float, box)
        side = max(width, height, 1.0) * (1 + 2 * margin)
        scale, half = size_px / side, (size_px - 1) / 2
        x, y = 0.5 - (x + width / 2), 0.5 - (y + height / 2)
        matrix = np.array([[scale, 0, half + scale * x], [0, scale, half + scale * y], [0, 0, 1]])
        return _warp(photo, matrix, size_px, cv2.BORDER_REPLICATE)

    def _decoded(self, photo: Photo, needed: Callable[[int, int], float]) -> tuple[np.ndarray, int]:
        """Pixels of a photo, reduced as far as `needed` allows, and the reduction."""
        if isinstance(photo, np.ndarray):
            return photo, 1
        from decode import decode_image, reduction

        factor = reduction(photo, needed)
        if self._last[0] is not photo:
            self._last = photo, {}
        pixels = self._last[1]
        if factor not in pixels:
            pixels[factor] = decode_image(photo, max_pixels=self.facts["max_pixels"], reduction=factor)
        return pixels[factor], factor


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities (k, classes) of logits (k, classes), which may be -inf."""
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shares / shares.sum(axis=1, keepdims=True)


def _warp(image: np.ndarray, matrix: np.ndarray, size_px: int, border: int) -> np.ndarray:
    scale = float(np.sqrt(abs(np.linalg.det(matrix[:2, :2]))))
    while scale <= 0.5 and min(image.shape[:2]) >= 2:  # halved by area averaging, which preserves small imprints
        height, width = image.shape[0] // 2, image.shape[1] // 2
        image = cv2.resize(image[: 2 * height, : 2 * width], (width, height), interpolation=cv2.INTER_AREA)
        matrix = matrix @ _shift(-0.5) @ np.diag([2.0, 2.0, 1.0]) @ _shift(0.5)
        scale *= 2
    grey = (PADDING_GREY,) * 3
    return cv2.warpAffine(
        image, matrix[:2], (size_px, size_px), flags=cv2.INTER_LINEAR, borderMode=border, borderValue=grey
    )


def _shift(by: float) -> np.ndarray:
    return np.array([[1, 0, by], [0, 1, by], [0, 0, 1]])


def _distinct(corners: np.ndarray, max_iou: float) -> list[int]:
    """Indices of the boxes, best first, that overlap no kept better box by more than `max_iou`."""
    area = (corners[:, 2:] - corners[:, :2]).prod(axis=1)
    kept: list[int] = []
    for index in range(len(corners)):
        low = np.maximum(corners[index, :2], corners[kept, :2])
        high = np.minimum(corners[index, 2:], corners[kept, 2:])
        shared = np.clip(high - low, 0, None).prod(axis=1)
        if (shared <= max_iou * (area[index] + area[kept] - shared)).all():
            kept.append(index)
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="+", type=Path)
    parser.add_argument("--allow", type=Path, help="text file of the possible codes, one per line")
    parser.add_argument("--hint", action="append", default=[], help="shape=round, colour=white or imprint=YH")
    parser.add_argument("--pairs", action="store_true", help="photos are front and back of a pill in turn")
    options = parser.parse_args()
    folder = Path(__file__).resolve().parent
    sys.path.insert(0, str(folder))
    from decode import BadImage
    from evidence import gather, read_allowed

    pipeline = Pipeline(folder)
    evidence = None
    if options.allow or options.hint:
        classes = pipeline.facts["classes"]
        try:
            allowed = read_allowed(options.allow, [entry["code"] for entry in classes]) if options.allow else None
            evidence = gather(classes, allowed, options.hint)
        except ValueError as error:
            parser.exit(2, f"{error}\n")
    if options.pairs and len(options.photos) % 2:
        parser.exit(2, "--pairs needs an even number of photos, front and back in turn\n")
    step = 2 if options.pairs else 1
    for start in range(0, len(options.photos), step):
        entries: list[dict[str, Any]] = []
        examined: list[Examined] = []
        for path in options.photos[start : start + step]:
            entries.append({"path": str(path), "error": None, "pills": []})
            try:
                examined.append(pipeline.examine(path.read_bytes()))
                entries[-1]["pills"] = pipeline.pills(examined[-1], evidence)
            except (BadImage, OSError) as error:
                entries[-1]["error"] = str(error)
        if options.pairs:
            answer = pipeline.both_sides(examined[0], examined[1], evidence) if len(examined) == 2 else None
            for entry, other in zip(entries, reversed(entries), strict=True):
                entry["both_sides"] = answer and answer | {"path": other["path"]}
        for entry in entries:
            print(json.dumps(entry, ensure_ascii=False))


if __name__ == "__main__":
    main()
