"""Folds batch normalisation into the preceding convolution, for inference."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

_TOLERANCE = 1e-2
"""Maximum difference as a fraction of the largest output: above TF32 rounding, below the effect of a wrong fold."""


@torch.no_grad()
def fused(model: nn.Module, example: torch.Tensor) -> nn.Module:
    """A copy of `model` (in eval mode) with each BatchNorm2d whose input is a convolution's output folded into it.

    The pairs are found by running `example`, an input batch. Returns `model` itself if the outputs differ.
    """
    folded = copy.deepcopy(model)
    for convolution, norm in _pairs(folded, example):
        weight, bias = fuse_conv_bn_weights(
            convolution.weight, convolution.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        convolution.weight, convolution.bias = (nn.Parameter(tensor, requires_grad=False) for tensor in (weight, bias))
        _replace(folded, norm, _activation_of(norm))
    before, after = model(example), folded(example)
    same = torch.isfinite(after).all() and (after - before).abs().max() <= _TOLERANCE * before.abs().max()
    return folded if same else model


def _pairs(model: nn.Module, example: torch.Tensor) -> list[tuple[Any, Any]]:
    made: dict[int, tuple[nn.Module, torch.Tensor]] = {}  # keeps the tensor, whose id() would be reused
    pairs: list[tuple[Any, Any]] = []

    def after_convolution(module: nn.Module, _: Any, output: torch.Tensor) -> None:
        made[id(output)] = module, output

    def before_norm(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if id(inputs[0]) in made:
            pairs.append((made[id(inputs[0])][0], module))

    hooks = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(after_convolution))
        elif isinstance(module, nn.BatchNorm2d):
            hooks.append(module.register_forward_pre_hook(before_norm))
    model(example)
    for hook in hooks:
        hook.remove()
    # A module that is called twice cannot be folded.
    return [(c, n) for c, n in pairs if sum(c is x for x, _ in pairs) == 1 and sum(n is y for _, y in pairs) == 1]


def _activation_of(norm: Any) -> nn.Module:
    """Dropout and activation that timm's normalisation layers contain."""
    parts = [part for part in (getattr(norm, "drop", None), getattr(norm, "act", None)) if part is not None]
    return nn.Sequential(*parts) if parts else nn.Identity()


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in model.modules():
        for name, child in parent.named_children():
            if child is old:
                setattr(parent, name, new)
