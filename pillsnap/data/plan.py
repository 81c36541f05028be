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
    passes: np.ndarray
    """How often each member has come before in training; in validation the epoch. Seeds the augmentation."""

    def position(self) -> dict[str, np.ndarray]:
        """Its position in the stream, as fields of a batch."""
        return {"epoch": np.array(self.epoch), "training": np.array(self.training), "step": np.array(self.step)}


@dataclass(frozen=True)
class StreamPlan:
    """One stream over all epochs: each epoch's training steps, then the validation steps of every `validate_every`th
    epoch and of the last one; `num_workers` slots per step.

    The samples of a step do not depend on the number of workers. An epoch takes the next `epoch_samples` of an endless
    sequence of permutations: every sample comes before any comes again. With `combinations_per_epoch` there are two
    such sequences, of combinations and of the other samples, evenly interleaved.
    """

    seed: int
    epochs: int
    num_train: int
    num_val: int
    batch_size: int
    """Samples per step over all workers."""
    num_workers: int
    samples_per_epoch: int | None = None
    """Training samples per epoch; None: `num_train`."""
    validate_every: int = 1
    num_combinations: int = 0
    """The training samples with the highest numbers that are combinations, drawn apart from the others."""
    combinations_per_epoch: int | None = None
    """Combinations among the samples of an epoch; None: one sequence of all samples."""

    @property
    def worker_batch_size(self) -> int:
        """Maximum samples of one worker per step; the last workers get fewer when the batch does not divide evenly."""
        return -(-self.batch_size // self.num_workers)

    @property
    def epoch_samples(self) -> int:
        """Training samples per epoch."""
        return self.samples_per_epoch or self.num_train

    @property
    def train_steps(self) -> int:
        return -(-self.epoch_samples // self.batch_size)

    @property
    def val_steps(self) -> int:
        """Steps of one validation."""
        return -(-self.num_val // self.batch_size)

    @property
    def num_slots(self) -> int:
        return self.first_slot(self.epochs)

    def validates(self, epoch: int) -> bool:
        """Whether validation steps follow the training steps of `epoch` (from 0)."""
        return (epoch + 1) % self.validate_every == 0 or epoch + 1 == self.epochs

    def first_slot(self, epoch: int, train_step: int = 0) -> int:
        """The first slot after `train_step` training steps of `epoch` (both from 0)."""
        num_validations = -(-epoch // self.validate_every) if epoch == self.epochs else epoch // self.validate_every
        return (epoch * self.train_steps + num_validations * self.val_steps + train_step) * self.num_workers

    def samples_in_step(self, training: bool, step: int) -> int:
        """Samples of one step over all workers."""
        return min(self.batch_size, (self.epoch_samples if training else self.num_val) - step * self.batch_size)

    def slot(self, number: int) -> Slot:
        """The slot with that number."""
        position, worker = divmod(number, self.num_workers)
        first, position = divmod(position, self.validate_every * self.train_steps + self.val_steps)
        first *= self.validate_every
        within = min(position // self.train_steps, min(self.validate_every, self.epochs - first) - 1)
        epoch, step = first + within, position - within * self.train_steps
        training = step < self.train_steps
        if not training:
            step -= self.train_steps
        start = step * self.batch_size + worker * self.worker_batch_size
        end = min(start + self.worker_batch_size, step * self.batch_size + self.samples_in_step(training, step))
        places = np.arange(start, max(start, end))
        if training:
            return Slot(epoch, training, step, *self._drawn(epoch, places))
        return Slot(epoch, training, step, places, np.full_like(places, epoch))

    def _drawn(self, epoch: int, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sample numbers and passes of an epoch's training samples at `places`."""
        size, apart = self.epoch_samples, self.combinations_per_epoch
        if apart is None:
            return _draw(self.seed, 0, self.num_train, epoch * size + places)
        before = places * apart // size
        is_apart = (places + 1) * apart // size > before
        num_others = self.num_train - self.num_combinations
        members, passes = np.empty_like(places), np.empty_like(places)
        members[~is_apart], passes[~is_apart] = _draw(
            self.seed, 0, num_others, epoch * (size - apart) + (places - before)[~is_apart]
        )
        numbers, passes[is_apart] = _draw(self.seed, 1, self.num_combinations, epoch * apart + before[is_apart])
        members[is_apart] = num_others + numbers
        return members, passes


def _draw(seed: int, sequence: int, size: int, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers at increasing `places` of an endless sequence of permutations of `size` numbers, and the permutation of
    each.
    """
    if not len(places):
        return places, places
    passes = places // size
    parts = [
        permutation(seed, sequence, number, size)[places[passes == number] - number * size]
        for number in range(int(passes[0]), int(passes[-1]) + 1)
    ]
    return np.concatenate(parts, dtype=np.int64), passes


@lru_cache(maxsize=4)  # a border of both sequences
def permutation(seed: int, sequence: int, number: int, size: int) -> np.ndarray:
    """Permutation `number` of a sequence."""
    rng = np.random.Generator(np.random.Philox(key=[seed, number], counter=[0, 0, 0, sequence]))
    order = np.arange(size, dtype=np.int32)
    rng.shuffle(order)
    order.setflags(write=False)
    return order
