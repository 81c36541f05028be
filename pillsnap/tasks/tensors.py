"""TODO docstring."""

from __future__ import annotations

import torch

from pillsnap.data.loader import DeviceBatch


def _unit_range(images: torch.Tensor) -> torch.Tensor:
    return images.permute(0, 3, 1, 2).float() / 255


def _valid_rows(batch: DeviceBatch, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    if batch.num_valid == len(batch.images):
        return tensors
    if (batch.index[: batch.num_valid] >= 0).all() and (batch.index[batch.num_valid :] < 0).all():
        return tuple(tensor[: batch.num_valid] for tensor in tensors)
    # A photo could not be read: only the device knows which, and the host waits for it.
    rows = batch.targets["valid"]
    return tuple(tensor[rows] for tensor in tensors)
