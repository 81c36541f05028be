"""The order of all samples as a function of (seed, position): the samples of each worker at each step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np


class Slot(NamedTuple):
    """One worker's share of one step."""

    epoch: int
    training: bool
    step: int
    """Step within the epoch's training or validation part, from 0."""
    members: np.ndarray
    """Sample numbers, at most a worker's batch; fewer at the end of an epoch."""

    def position(self) -> dict[str, np.ndarray]:
        """Its position in the stream, as fields of a batch."""
        return {"epoch": np.array(self.epoch), "training": np.array(self.training), "step": np.array(self.step)}


@dataclass(frozen=True)
class StreamPlan:
    """One stream over all epochs: each epoch's training steps, then its validation steps, `num_workers` slots per
    step.

    The samples of a step do not depend on the number of workers. Each sample comes exactly once per epoch.
    """

    seed: int
    epochs: int
    num_train: int
    num_val: int
    batch_size: int
    """Samples per step over all workers."""
    num_workers: int

    @property
    def worker_batch_size(self) -> int:
        """Maximum samples of one worker per step; the last workers get fewer when the batch does not divide evenly."""
        return -(-self.batch_size // self.num_workers)

    @property
    def train_steps(self) -> int:
        return -(-self.num_train // self.batch_size)

    @property
    def val_steps(self) -> int:
        return -(-self.num_val // self.batch_size)

    @property
    def steps_per_epoch(self) -> int:
        return self.train_steps + self.val_steps

    @property
    def num_slots(self) -> int:
        return self.epochs * self.steps_per_epoch * self.num_workers

    def first_slot(self, epoch: int, train_step: int = 0) -> int:
        """The first slot after `train_step` training steps of `epoch` (both from 0)."""
        return (epoch * self.steps_per_epoch + train_step) * self.num_workers

    def samples_in_step(self, training: bool, step: int) -> int:
        """Samples of one step over all workers."""
        return min(self.batch_size, (self.num_train if training else self.num_val) - step * self.batch_size)

    def slot(self, number: int) -> Slot:
        """The slot with that number."""
        position, worker = divmod(number, self.num_workers)
        epoch, step = divmod(position, self.steps_per_epoch)
        training = step < self.train_steps
        if not training:
            step -= self.train_steps
        order = epoch_order(self.seed, epoch, self.num_train) if training else np.arange(self.num_val)
        whole = order[step * self.batch_size : (step + 1) * self.batch_size]
        return Slot(
            epoch, training, step, whole[worker * self.worker_batch_size : (worker + 1) * self.worker_batch_size]
        )


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    """Permutation of the sample numbers for one epoch (from 0)."""
    rng = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    order = rng.permutation(num_samples)
    order.setflags(write=False)
    return order
