"""The order of all samples as a function of (seed, position): what every worker gets at every step of every epoch."""

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

    def place(self) -> dict[str, np.ndarray]:
        """Where in the stream it is: what a batch says of it."""
        return {"epoch": np.array(self.epoch), "training": np.array(self.training), "step": np.array(self.step)}


@dataclass(frozen=True)
class StreamPlan:
    """One stream over all epochs: each epoch's training steps, then its validation steps, `num_workers` slots a step.

    Samples of a step are the same whatever the number of workers is; each sample comes exactly once an epoch.
    """

    seed: int
    epochs: int
    num_train: int
    num_val: int
    batch_size: int
    """Samples a step over all workers."""
    num_workers: int

    @property
    def worker_batch_size(self) -> int:
        """Most samples of a step that one worker gets; where they cannot be shared evenly, the last gets fewer."""
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
        """The slot at which the stream goes on after `train_step` training steps of `epoch` (both from 0)."""
        return (epoch * self.steps_per_epoch + train_step) * self.num_workers

    def samples_in_step(self, training: bool, step: int) -> int:
        """Samples that all workers get together in one step."""
        return min(self.batch_size, (self.num_train if training else self.num_val) - step * self.batch_size)

    def slot(self, number: int) -> Slot:
        """What slot `number` holds."""
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
