"""Exports both models of a run to ONNX, compares them with torch, and adds a stand-alone pipeline."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from pillsnap.errors import UserError
from pillsnap.files import write_atomically, write_json
from pillsnap.metrics import evidence, limits
from pillsnap.models.classifier import logits_and_features
from pillsnap.photos import decode
from pillsnap.runs.directory import Run
from pillsnap.runs.enrolled import Enrolled
from pillsnap.tasks.best_model import load_best

MAX_DIFFERENCE = 1e-3
"""Largest accepted difference of an output, relative to the largest output."""
_NEEDED = ("onnx", "onnxscript", "onnxruntime")
_CLASS_FACTS = ("code", "name", "edi_codes", "attributes")


class _DetectorBoxes(nn.Module):
    """(n, 3, s, s) in 0 to 1 -> corners (n, k, 4) x1, y1, x2, y2 in pixels and scores (n, k)."""

    def __init__(self, detector: Any, end_to_end: bool) -> None:
        super().__init__()
        self.detector, self.end_to_end = detector, end_to_end

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output = self.detector(images)
        output = output[0] if isinstance(output, tuple) else output
        if self.end_to_end:
            return output[..., :4], output[..., 4]
        centre, size, scores = output[:, :2], output[:, 2:4], output[:, 4]
        return torch.cat([centre - size / 2, centre + size / 2], 1).transpose(1, 2), scores


class _ClassifierOutputs(nn.Module):
    """(n, 3, s, s), normalised -> logits (n, classes) and features (n, d)."""

    def __init__(self, classifier: Any, enrolled: Enrolled | None) -> None:
        super().__init__()
        self.classifier = classifier
        self.more_rows = None
        if enrolled is not None:
            weight, bias = map(torch.from_numpy, enrolled.padded)
            self.more_rows = weight, bias

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return logits_and_features(self.classifier, images, self.more_rows)


def export_run(run: Run, folder: Path) -> dict[str, float]:
    """Write detector.onnx, classifier.onnx, pipeline.json, pipeline.py and its modules into `folder`, and the limits of
    the run's answers, if it was evaluated.

    Returns the largest difference of each model from torch, relative to its largest output.

    Raises UserError when a package or a trained model is missing, or a difference exceeds MAX_DIFFERENCE.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"Exporting to ONNX needs {', '.join(missing)}: pip install {' '.join(missing)}")
    trained = run.codes[: run.num_trained]
    best = {name: load_best(run.where, name, run.settings, trained) for name in ("detection", "classification")}
    untrained = [name for name, found in best.items() if found is None]
    if untrained:
        raise UserError(f"{run.where} has no trained model for {' and '.join(untrained)}: train it first.")
    if run.enrolled:
        run.enrolled.require(best["classification"].weights_sha256, run.where)  # type: ignore[union-attr]
    folder.mkdir(parents=True, exist_ok=True)
    detection, classification = run.settings.detection, run.settings.classification
    detector: Any = best["detection"].model  # type: ignore[union-attr]
    end_to_end = bool(getattr(detector.model[-1], "end2end", False))
    boxes = _DetectorBoxes(detector.fuse(verbose=False), end_to_end).eval()
    classifier: Any = best["classification"].model  # type: ignore[union-attr]
    names = _ClassifierOutputs(classifier, run.enrolled)
    differences = {
        "detector": _export(boxes, detection.image_size_px, folder / "detector.onnx", ["corners", "scores"], 1),
        "classifier": _export(
            names, classification.image_size_px, folder / "classifier.onnx", ["logits", "features"], 2
        ),
    }
    mean, std = (classifier.pretrained_cfg[name] for name in ("mean", "std"))
    facts = {
        "max_pixels": run.settings.data.max_pixels,
        "detection": {
            "image_size_px": detection.image_size_px,
            "confidence": run.settings.evaluation.confidence,
            "nms_iou": run.settings.evaluation.nms_iou,
            "suppress_overlaps": not end_to_end,
        },
        "classification": {
            "image_size_px": classification.image_size_px,
            "crop_margin": classification.crop_margin if classification.input == "crop" else None,
            "mean": list(mean),
            "std": list(std),
            "temperature": best["classification"].metrics.get("temperature", 1.0),  # type: ignore[union-attr]
            "num_trained": run.num_trained,
        },
        "classes": [
            {name: value for name, value in asdict(entry).items() if name in _CLASS_FACTS} for entry in run.classes
        ],
    }
    write_json(folder / "pipeline.json", facts)
    shutil.copyfile(Path(__file__).with_name("pipeline.py"), folder / "pipeline.py")
    of_run = limits.read_limits(run.run_dir)
    if of_run is not None and of_run.model == best["classification"].weights_sha256:  # type: ignore[union-attr]
        write_atomically(folder / limits.LIMITS_NAME, of_run.to_bytes())
    else:
        (folder / limits.LIMITS_NAME).unlink(missing_ok=True)  # of another model
    for module in (decode, evidence, limits):
        (folder / f"{module.__name__.rpartition('.')[2]}.py").write_text(_standalone(module), encoding="utf-8")
    return differences


def _standalone(module: ModuleType) -> str:
    """The source of a module, without its import of this package."""
    source = Path(str(module.__file__)).read_text(encoding="utf-8")
    ours = "from pillsnap.errors import UserError\n"
    assert source.count(ours) == 1 and source.count("pillsnap.") == 1, f"{module} must need one name of this package"
    return source.replace(ours, "UserError = ValueError\n")


def _export(model: nn.Module, size_px: int, path: Path, outputs: list[str], batch: int) -> float:
    """Export, run both models on noise, compare. With `batch` above 1 the exported model takes any number of images."""
    import onnxruntime

    images = torch.rand(batch, 3, size_px, size_px, generator=torch.Generator().manual_seed(0))
    shapes = {"images": {0: torch.export.Dim("num", min=1)}} if batch > 1 else None
    with torch.no_grad():  # before the export: ultralytics' head caches its first grid
        expected = model(images)
    expected = expected if isinstance(expected, tuple) else (expected,)
    torch.onnx.export(
        _Named(model).eval(), (images,), str(path), input_names=["images"], output_names=outputs, dynamo=True,
        dynamic_shapes=shapes, external_data=False, verbose=False,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = session.run(None, {"images": images.numpy()})
    difference = max(
        float(np.abs(ours - theirs.numpy()).max() / max(float(theirs.abs().max()), 1.0))
        for ours, theirs in zip(found, expected, strict=True)
    )
    if not difference <= MAX_DIFFERENCE:
        raise UserError(f"{path} differs from torch by {difference:.2g}, more than {MAX_DIFFERENCE}: do not use it.")
    return difference


class _Named(nn.Module):
    """Names the input of a model `images`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> Any:
        return self.model(images)
