"""Batch normalisation folded into the convolution before it, for models that only infer."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

_TOLERANCE = 1e-2
"""Of the largest output: rounding of a GPU's TF32 stays below it, and a wrong fold does not."""


@torch.no_grad()
def fused(model: nn.Module, example: torch.Tensor) -> nn.Module:
    """`model`, in eval mode, with fewer layers: whatever normalises the output of a convolution as it comes is folded
    into its weights. Which does is seen on `example`, an input; where the result is not the same within rounding, the
    model comes back as it was.
    """
    folded = copy.deepcopy(model)
    for convolution, norm in _pairs(folded, example):
        weight, bias = fuse_conv_bn_weights(
            convolution.weight, convolution.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        convolution.weight, convolution.bias = (nn.Parameter(tensor, requires_grad=False) for tensor in (weight, bias))
        _replace(folded, norm, _what_follows(norm))
    before, after = model(example), folded(example)
    same = torch.isfinite(after).all() and (after - before).abs().max() <= _TOLERANCE * before.abs().max()
    return folded if same else model


def _pairs(model: nn.Module, example: torch.Tensor) -> list[tuple[Any, Any]]:
    made: dict[int, tuple[nn.Module, torch.Tensor]] = {}  # the tensor, too: a number is used again when it is gone
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
    # A module that is called twice belongs to two places.
    return [(c, n) for c, n in pairs if sum(c is x for x, _ in pairs) == 1 and sum(n is y for _, y in pairs) == 1]


def _what_follows(norm: Any) -> nn.Module:
    """timm's normalisation brings its activation along."""
    parts = [part for part in (getattr(norm, "drop", None), getattr(norm, "act", None)) if part is not None]
    return nn.Sequential(*parts) if parts else nn.Identity()


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in model.modules():
        for name, child in parent.named_children():
            if child is old:
                setattr(parent, name, new)
