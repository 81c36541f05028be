"""The timm classifier that names a crop."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from pillsnap.errors import UserError


def build_classifier(model: str, weights: str, *, num_classes: int, drop_rate: float) -> nn.Module:
    """A timm model; `weights` is `pretrained` (timm's hub), `random`, or a local file of weights.

    Raises UserError when the model is unknown or the weights cannot be had.
    """
    import timm

    if not timm.is_model(model.split(".")[0]):
        near = timm.list_models(f"*{model.split('_')[0]}*")[:5]
        raise UserError(f"timm has no model {model!r}." + (f" Near it: {', '.join(near)}." if near else ""))
    options: dict[str, Any] = {"num_classes": num_classes, "drop_rate": drop_rate}
    if weights == "random":
        return timm.create_model(model, **options)
    if weights != "pretrained":
        if not Path(weights).is_file():
            raise UserError(
                f"The classification weights {weights!r} are not there: "
                "set classification.weights to a file, 'pretrained' or 'random'."
            )
        options["pretrained_cfg_overlay"] = {"file": weights}
    try:
        return timm.create_model(model, pretrained=True, **options)
    except Exception as error:  # the hub raises whatever its download layers raise
        raise UserError(
            f"The classification weights for {model!r} cannot be loaded "
            f"({type(error).__name__}: {' '.join(str(error).split())[:160]}): connect to the network once, "
            "set classification.weights to a local file, or to 'random' to start from nothing."
        ) from error


def input_statistics(classifier: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation (RGB, 0 to 1) that the model expects its input to be normalised with."""
    config = classifier.pretrained_cfg
    return tuple(config["mean"]), tuple(config["std"])


def normalise(images: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """(n, s, s, 3) uint8 -> (n, 3, s, s) float32, channels last in memory."""
    images = images.permute(0, 3, 1, 2).float()
    shift = torch.tensor(mean, device=images.device).view(1, 3, 1, 1) * 255
    scale = torch.tensor(std, device=images.device).view(1, 3, 1, 1) * 255
    return (images - shift) / scale


def classification_loss(
    logits: torch.Tensor, labels: torch.Tensor, valid: torch.Tensor, label_smoothing: float
) -> torch.Tensor:
    """Sum of the cross-entropy over the valid rows; `logits` (n, classes), `labels` and `valid` (n,)."""
    losses = functional.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing, reduction="none")
    return (losses * valid).sum()


def export_for_timm(
    classifier: nn.Module,
    path: Path,
    *,
    model: str,
    codes: list[str],
    image_size_px: int,
    crop_margin: float,
    temperature: float = 1.0,
) -> None:
    """Write a file that `torch.load(path, weights_only=True)` reads: `state_dict` fits `timm.create_model(model,
    num_classes)`; the softmax of its logits divided by `temperature` is the calibrated confidence.
    """
    mean, std = input_statistics(classifier)
    contents = {
        "model": model,
        "num_classes": len(codes),
        "codes": list(codes),
        "image_size_px": image_size_px,
        "crop_margin": crop_margin,
        "temperature": temperature,
        "mean": list(mean),
        "std": list(std),
        "state_dict": {name: tensor.detach().cpu() for name, tensor in classifier.state_dict().items()},
    }
    partial = path.with_suffix(".partial")
    torch.save(contents, partial)
    os.replace(partial, path)
