"""Carries a trained classifier over to other classes: the rows of its head follow their codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch


def weights_for_classes(
    classifier: Any, trained: Mapping[str, torch.Tensor], trained_codes: Sequence[str], codes: Sequence[str], seed: int
) -> dict[str, torch.Tensor]:
    """The state dict `trained`, of the classes `trained_codes`, for `classifier`, of the classes `codes`.

    A row of the head moves with its code. The row of a new class is drawn from a normal distribution with the mean and
    the standard deviation of the trained rows, feature by feature: none of the new classes is more or less likely than
    a trained one at the start. `seed` determines them.
    """
    layers = classifier.get_classifier()  # some models have two
    heads = {id(layer) for layer in (layers if isinstance(layers, tuple) else (layers,))}
    names = [name for name, layer in classifier.named_modules() if id(layer) in heads]
    row_of = {code: row for row, code in enumerate(trained_codes)}
    source = torch.tensor([row_of.get(code, -1) for code in codes])
    generator = torch.Generator().manual_seed(seed)
    weights = dict(trained)
    for key in (key for name in names for key in (f"{name}.weight", f"{name}.bias") if key in trained):
        rows = trained[key]
        fresh = torch.randn(len(codes), *rows.shape[1:], generator=generator) * rows.std(0, correction=0) + rows.mean(0)
        is_new = (source < 0).view(-1, *[1] * (rows.ndim - 1))
        weights[key] = torch.where(is_new, fresh.to(rows.dtype), rows[source])
    return weights
