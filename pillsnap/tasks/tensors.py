"""Batch tensors as models take them."""

from __future__ import annotations

import torch

from pillsnap.data.loader import DeviceBatch


def unit_range(images: torch.Tensor) -> torch.Tensor:
    """(n, h, w, 3) uint8 -> (n, 3, h, w) float32 in [0, 1]."""
    return images.permute(0, 3, 1, 2).float() / 255


def valid_rows(batch: DeviceBatch, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The rows of each tensor that hold a sample; a host sync only when a photo could not be read."""
    if batch.num_valid == len(batch.images):
        return tensors
    if (batch.index[: batch.num_valid] >= 0).all() and (batch.index[batch.num_valid :] < 0).all():
        return tuple(tensor[: batch.num_valid] for tensor in tensors)
    # Which photos could not be read is known on the device only.
    rows = batch.targets["valid"]
    return tuple(tensor[rows] for tensor in tensors)
