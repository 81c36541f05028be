"""Splits a batch that does not fit into GPU memory into microbatches; the optimizer step stays the same.

When a step, a validation batch or the loader's copy to the device runs out of memory, it is tried again at the same
size after freeing memory. Then the microbatch size is halved until it fits, equally on all workers, and kept in
`memory.json` of the run directory, so that a restart begins with it. Batch normalisation takes its statistics from each
microbatch: with it, a split step only approximates the unsplit one. Without it, both compute the same sum in another
order.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from pillsnap.data.loader import DeviceBatch
from pillsnap.errors import UserError
from pillsnap.files import write_json
from pillsnap.train.step.collectives import WorkerGroup

_TRIAL_STEPS = 3
"""Steps after a start or a change of a size at which the workers agree on whether the batch fitted."""
_OTHER_MESSAGES = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
Losses = dict[str, torch.Tensor]
ResultT = TypeVar("ResultT")


class SplitAgain(RuntimeError):
    """One of several workers ran out of memory at a step without agreement: the workers must restart."""


class MicrobatchRunner:
    """Computes batches in microbatches of `size` rows.

    `warn` is called once per change of size, and `share` with the file that keeps it.
    """

    def __init__(
        self,
        task: str,
        batch_size: int,
        group: WorkerGroup,
        path: Path | None,
        warn: Callable[[str], None],
        share: Callable[[Path], None] | None = None,
    ) -> None:
        self._share = share
        self._task, self._batch_size, self._group, self._path, self._warn = task, batch_size, group, path, warn
        self.size = min(batch_size, _read(path).get(task, batch_size))
        self._trials_left = _TRIAL_STEPS

    @property
    def agrees(self) -> bool:
        """Whether the workers agree after this step on whether the batch fitted on all of them."""
        return self._trials_left > 0

    def expect_change(self) -> None:
        """Make the workers agree again: the images of the next step have another size."""
        self._trials_left = _TRIAL_STEPS

    def parts(self, batch: DeviceBatch) -> Iterator[DeviceBatch]:
        """The batch in microbatches of `size` rows, in order. All have one shape, for which the model is compiled: the
        last one begins with rows of the one before, which count once.
        """
        rows = len(batch.images)
        if rows <= self.size:
            yield batch
            return
        all_read = int((batch.index >= 0).sum()) == batch.num_valid
        for start in range(0, rows, self.size):
            first = min(start, rows - self.size)
            taken, repeated = slice(first, first + self.size), start - first
            targets = {name: tensor[taken] for name, tensor in batch.targets.items()}
            index = batch.index[taken]
            if repeated:
                index, targets["valid"] = index.copy(), targets["valid"].clone()
                index[:repeated], targets["valid"][:repeated] = -1, False
            num_samples = int((index >= 0).sum())
            # Which rows of unreadable photos are empty is known on the device only: this is a host sync.
            num_valid = num_samples if all_read else int(targets["valid"].sum())
            yield replace(batch, images=batch.images[taken], targets=targets, index=index, num_valid=num_valid)

    def run(
        self,
        batch: DeviceBatch,
        compute: Callable[[DeviceBatch, bool], Losses],
        undo: Callable[[], None],
        weigh: Callable[[list[DeviceBatch]], list[DeviceBatch]] = lambda parts: parts,
    ) -> Losses:
        """Compute all microbatches and return the batch's losses.

        `compute(microbatch, last)` runs forward and backward, adds to the gradients, and returns its share of the
        losses. `weigh` prepares several microbatches so that their shares add up to the batch's losses. `undo` reverts
        a failed attempt. Raises UserError, on every worker, when a single row does not fit.
        """

        def attempt() -> Losses:
            total: Losses = {}
            parts = list(self.parts(batch))
            if len(parts) > 1:
                parts = weigh(parts)
            for number, part in enumerate(parts, start=1):
                for name, share in compute(part, number == len(parts)).items():
                    total[name] = total[name] + share if name in total else share
            return total

        losses = self._until_it_fits(attempt, undo)
        self._trials_left = max(0, self._trials_left - 1)
        return losses

    def fetch(self, batches: Iterator[DeviceBatch]) -> DeviceBatch:
        """The next batch. `batches` gives one that did not fit when it is asked again."""
        fetched: list[DeviceBatch] = []

        def attempt() -> DeviceBatch:
            if not fetched:  # else another worker's copy failed
                fetched.append(next(batches))
            return fetched[0]

        return self._until_it_fits(attempt)

    def facts(self, batch: DeviceBatch, validate: Callable[[DeviceBatch], list[Any]]) -> list[Any]:
        """Facts about a validation batch, by microbatches."""
        return self._until_it_fits(lambda: [fact for part in self.parts(batch) for fact in validate(part)])

    def _until_it_fits(self, attempt: Callable[[], ResultT], undo: Callable[[], None] | None = None) -> ResultT:
        """The result of `attempt`; `undo` reverts a failed one, and is given when attempts contain collectives."""
        freed = False
        while True:
            result, error = _attempt(attempt)
            failed = self._group.any(bool(error)) if self.agrees else bool(error)
            if not failed:
                return result  # type: ignore[return-value]
            if undo is not None:
                undo()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            alone = self._group.size > 1 and not self.agrees
            # A worker alone cannot repeat its part of collectives: those of the others would not match.
            if freed or (alone and undo is not None):
                self._halve(error, alone)
                if alone:
                    raise SplitAgain(
                        f"{self._task}: a batch did not fit into this worker's memory; the workers restart with parts "
                        f"of {self.size}."
                    )
            freed = True

    def _halve(self, error: str, alone: bool) -> None:
        if self.size == 1:
            raise UserError(
                f"{self._task}: a single image does not fit into the memory of the GPU"
                + (f" ({error})" if error else " of another worker")
                + f". Choose a smaller {self._task}.image_size_px or {self._task}.model, or end other GPU processes."
            )
        self.size = -(-self.size // 2)
        self._trials_left = _TRIAL_STEPS
        if self._path is not None and (alone or self._group.rank == 0):
            write_json(self._path, _read(self._path) | {self._task: self.size})
            if self._share is not None:
                self._share(self._path)
        self._warn(
            f"{self._task}: a batch of {self._batch_size} per worker does not fit into GPU memory. It is computed in "
            f"parts of {self.size} whose gradients are added up; the batch of the optimizer step stays the same."
        )


def _attempt(attempt: Callable[[], ResultT]) -> tuple[ResultT | None, str]:
    """The result, or why memory ran out. The exception itself would keep the tensors of the failed attempt alive."""
    try:
        return attempt(), ""
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None, str(error).splitlines()[0]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device ran out of memory; libraries report it in several ways."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(name in str(error) for name in _OTHER_MESSAGES)


def _read(path: Path | None) -> dict[str, int]:
    if path is None:
        return {}
    try:
        sizes = json.loads(path.read_text(encoding="utf-8"))
        return {str(task): int(size) for task, size in sizes.items() if int(size) > 0}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}  # the sizes are found again
