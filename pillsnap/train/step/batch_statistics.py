"""Statistics of batch normalisation of the averaged model, estimated before each validation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pillsnap.data.loader import DeviceBatch
from pillsnap.train.step.collectives import WorkerGroup, broadcast_from_first, by_dtype
from pillsnap.train.step.microbatch import MicrobatchRunner

STATISTICS_STEPS = 10
"""The last training steps before a validation, on whose batches the statistics are estimated."""
STATISTICS = ("running_mean", "running_var")


class BatchStatistics:
    """Means over the last training batches before a validation, each passed through the averaged model.

    The running statistics of the trained model, and averages of them, are those of earlier and other weights: they do
    not fit the averaged ones while the weights move fast. Izmailov et al., "Averaging weights leads to wider optima and
    better generalization", 2018; Wu and Johnson, "Rethinking 'batch' in BatchNorm", 2021.
    """

    def __init__(self, average: nn.Module, group: WorkerGroup, microbatches: MicrobatchRunner) -> None:
        self._group, self._microbatches = group, microbatches
        self._norms: list[Any] = [
            module for module in average.modules() if getattr(module, "running_mean", None) is not None
        ]

    def add(self, batch: DeviceBatch, step: int, num_steps: int, forward: Callable[[DeviceBatch], Any]) -> None:
        """Count the batch of a training step if it is one of the last of `num_steps`. `forward` passes a part of it
        through the averaged model. After the last one, all workers have rank 0's statistics.

        The state is in the average's buffers and the position alone, so that a resumed run has the same.
        """
        number = step - max(0, num_steps - STATISTICS_STEPS)
        if number < 0 or not self._norms:
            return
        num_counted = number * -(-len(batch.images) // self._microbatches.size)

        def count(part: DeviceBatch) -> list[Any]:
            nonlocal num_counted
            num_counted += 1
            for norm in self._norms:
                norm.momentum = 1 / num_counted
                norm.train()  # the other layers, dropout among them, stay in eval mode
            forward(part)
            return []

        with torch.no_grad():
            self._microbatches.facts(batch, count)
        for norm in self._norms:
            norm.eval()
        if step == num_steps - 1 and self._group.size > 1:
            for same_dtype in by_dtype([getattr(norm, name) for norm in self._norms for name in STATISTICS]):
                broadcast_from_first(same_dtype)
