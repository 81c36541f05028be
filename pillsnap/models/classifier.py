"""The timm classifier: crops (n, size, size, 3) uint8 -> logits (n, classes) and features; its loss and its export."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from pillsnap.caches import private_folder
from pillsnap.errors import UserError
from pillsnap.models.precision import compute_in_single, without_autocast


def build_classifier(
    model: str, weights: str, *, num_classes: int, drop_rate: float, notes: list[str] | None = None
) -> nn.Module:
    """A timm model with float32 logits, under autocast as well; `weights` is `pretrained` (timm's hub), `random`, or a
    local file of weights.

    A file's head for another number of classes is replaced by a new one, and `notes` gets a line about it. Raises
    UserError when the model is unknown, or the weights cannot be loaded or do not fit otherwise.
    """
    from pillsnap.models.quiet_timm import timm

    if not timm.is_model(model.split(".")[0]):
        similar = timm.list_models(f"*{model.split('_')[0]}*")[:5]
        raise UserError(f"timm has no model {model!r}." + (f" Similar: {', '.join(similar)}." if similar else ""))
    options: dict[str, Any] = {"num_classes": num_classes, "drop_rate": drop_rate}
    if weights == "random":
        return _with_precise_logits(timm.create_model(model, **options))
    if weights != "pretrained":
        if not Path(weights).is_file():
            raise UserError(
                f"The classification weights {weights!r} are not there: "
                "set classification.weights to a file, 'pretrained' or 'random'."
            )
        Path(weights).open("rb").close()  # raises PermissionError with the path
    try:
        if weights == "pretrained":
            return _with_precise_logits(
                timm.create_model(model, pretrained=True, cache_dir=_weights_folder(), **options)
            )
        state, note = _fitting_state(model, weights, options)
        overlay = {"state_dict": state, "num_classes": num_classes, "label_offset": 0, "custom_load": False}
        classifier = timm.create_model(model, pretrained=True, pretrained_cfg_overlay=overlay, **options)
        classifier.pretrained_cfg.pop("state_dict", None)
        if note and notes is not None:
            notes.append(note)
        return _with_precise_logits(classifier)
    except Exception as error:  # download layers raise anything
        advice = (
            "connect to the network once, set classification.weights to a local file, or to 'random' for untrained "
            "weights" if weights == "pretrained" else "it is damaged, or of another model"
        )  # fmt: skip
        raise UserError(
            f"The classification weights {weights!r} for {model!r} cannot be loaded "
            f"({type(error).__name__}: {' '.join(str(error).split())[:160]}): {advice}."
        ) from error


def _weights_folder() -> Path | None:
    """Where timm keeps fetched weights; None: where the user's variables say."""
    if {"HF_HOME", "HF_HUB_CACHE", "TORCH_HOME"} & set(os.environ):
        return None
    return private_folder("weights")


def _with_precise_logits(model: Any) -> nn.Module:
    layers = model.get_classifier()  # some models have two
    for layer in layers if isinstance(layers, tuple) else (layers,):
        compute_in_single(layer)
    return model


def _fitting_state(model: str, weights: str, options: dict[str, Any]) -> tuple[dict[str, torch.Tensor], str]:
    """The tensors of a file with a new head where its own is for another number of classes, and a line about that.

    timm decides by the number of classes in its table, not in the file, and then ignores whatever else does not fit.
    """
    from pillsnap.models.quiet_timm import timm

    state = timm.models.load_state_dict(weights)
    with torch.random.fork_rng(devices=[]):
        own = timm.create_model(model, **options)
    names = own.pretrained_cfg.get("classifier") or ()
    note = ""
    for name in (names,) if isinstance(names, str) else names:
        for key in (f"{name}.weight", f"{name}.bias"):
            fresh = own.state_dict().get(key)
            if fresh is not None and key in state and state[key].shape != fresh.shape:
                note = f"{weights}: the head for {len(state[key])} classes is replaced by one for {len(fresh)}"
                state[key] = fresh
    return state, note


def logits_and_features(
    classifier: Any, inputs: torch.Tensor, more_rows: tuple[torch.Tensor, torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The classifier's float32 logits (n, classes), bit for bit those of its `forward`, and the pooled features (n, d),
    float32, of which its head computes them.

    `more_rows`, weight (k, rows, d) and bias (k, rows), append logits of k more classes, each the highest of its rows.
    """
    maps = classifier.forward_features(inputs)
    # Pooling twice costs nothing measurable, and suits models of two heads.
    logits, features = classifier.forward_head(maps), classifier.forward_head(maps, pre_logits=True).flatten(1).float()
    if more_rows is not None:
        with without_autocast(features.device):
            weight, bias = more_rows
            rows = functional.linear(features, weight.flatten(0, 1), bias.flatten())
            logits = torch.cat([logits, rows.unflatten(1, bias.shape).amax(2)], 1)
    return logits, features


def input_statistics(classifier: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation (RGB, of 0 to 1) of the model's input normalisation."""
    config = classifier.pretrained_cfg
    return tuple(config["mean"]), tuple(config["std"])


def normalise(images: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """(n, s, s, 3) uint8 -> (n, 3, s, s) float32, channels last in memory."""
    shift, scale = _on_device(mean, images.device), _on_device(std, images.device)
    return images.permute(0, 3, 1, 2).float().sub_(shift).div_(scale)


@functools.cache
def _on_device(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    # Copied once: a copy from pageable memory synchronises host and device.
    with torch.inference_mode(False):
        return torch.tensor(values, device=device).view(1, 3, 1, 1) * 255


def resized(images: torch.Tensor, size_px: int) -> torch.Tensor:
    """(n, c, s, s) -> (n, c, size_px, size_px), antialiased; unchanged if already of that size."""
    if images.shape[-1] == size_px:
        return images
    return functional.interpolate(images, (size_px, size_px), mode="bilinear", antialias=True, align_corners=False)


def progressive_size(epoch: int, epochs: int, from_px: int | None, to_px: int) -> int:
    """Crop size of an epoch (from 0): three sizes, multiples of 16 px and evenly spaced, over two thirds of the epochs,
    then `to_px`. Each size compiles the model once.

    Tan and Le, "EfficientNetV2", 2021, section 4: four sizes.
    """
    if from_px is None or from_px >= to_px:
        return to_px
    part = epoch * 9 // (epochs * 2)  # a third of the growing epochs each
    return (from_px + (to_px - from_px) * part // 3) // 16 * 16 if part < 3 else to_px


def mixed(images: torch.Tensor, valid: torch.Tensor, alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixup: images (n, c, s, s) mixed with the batch in reverse order, and each row's own weight (n,).

    Zhang et al., "mixup", 2018. One weight per batch is drawn from Beta(alpha, alpha) by torch's CPU generator, whose
    state is in checkpoints. A row is not mixed if its counterpart is not `valid` (n,).
    """
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    own = torch.where(valid.flip(0), share, 1.0).to(images.dtype)
    weights = own[:, None, None, None]
    return images * weights + images.flip(0) * (1 - weights), own


def classification_loss(
    logits: torch.Tensor, labels: torch.Tensor, valid: torch.Tensor, label_smoothing: float
) -> torch.Tensor:
    """Sum of the cross-entropy of `logits` (n, classes) and `labels` (n,), weighted by `valid` (n,) bool or float."""
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
