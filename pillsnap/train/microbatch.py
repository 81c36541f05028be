"""A batch that does not fit into the GPU's memory is computed in parts; the optimizer step stays what it was.

The size of a part is halved until it fits, on all workers alike, and kept in `memory.json` beside the run, so that a
restart does not try again what did not fit. Models with batch normalisation take their statistics from each part, so
for them a split step equals the unsplit one only nearly; all others compute the same sum in another order.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from pillsnap.data.loader import DeviceBatch
from pillsnap.errors import UserError
from pillsnap.files import write_json
from pillsnap.train.collectives import Peers

_TRIAL_STEPS = 3
"""Steps after a start or a change in which all workers tell each other whether the batch fitted."""
_OTHER_NAMES = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
Losses = dict[str, torch.Tensor]


class SplitAgain(RuntimeError):
    """One of several workers ran out of memory where the others could not know: the workers have to start again."""


class MicroBatches:
    """Computes batches in parts of `size` rows.

    `compute` runs one part forward and backward, adds to the gradients, and returns its share of the step's losses.
    `undo` takes back what a failed attempt did. `say` is told once when the size changes, and `share`
    the file that remembers it.
    """

    def __init__(
        self,
        task: str,
        batch_size: int,
        peers: Peers,
        path: Path | None,
        say: Callable[[str], None],
        share: Callable[[Path], None] | None = None,
    ) -> None:
        self._share = share
        self._task, self._batch_size, self._peers, self._path, self._say = task, batch_size, peers, path, say
        self.size = min(batch_size, _read(path).get(task, batch_size))
        self._trials_left = _TRIAL_STEPS

    @property
    def careful(self) -> bool:
        """Whether the workers agree after this step that everybody's batch fitted, which costs them some time."""
        return self._trials_left > 0

    def parts(self, batch: DeviceBatch) -> Iterator[DeviceBatch]:
        """The batch in parts of `size` rows, in order."""
        rows = len(batch.images)
        if rows <= self.size:
            yield batch
            return
        all_read = int((batch.index >= 0).sum()) == batch.num_valid
        for start in range(0, rows, self.size):
            taken = slice(start, start + self.size)
            targets = {name: tensor[taken] for name, tensor in batch.targets.items()}
            members = int((batch.index[taken] >= 0).sum())
            # Where a photo could not be read only the device knows which, and the host waits for it.
            num_valid = members if all_read else int(targets["valid"].sum())
            yield replace(
                batch, images=batch.images[taken], targets=targets, index=batch.index[taken], num_valid=num_valid
            )

    def run(
        self, batch: DeviceBatch, compute: Callable[[DeviceBatch, bool], Losses], undo: Callable[[], None]
    ) -> Losses:
        """The losses of the whole batch, its gradients added up. `compute` is told whether its part is the last.

        Raises UserError, on every worker, when a single row does not fit.
        """
        while True:
            losses, error = self._attempt(batch, compute)
            failed = self._peers.any(bool(error)) if self.careful else bool(error)
            if not failed:
                self._trials_left = max(0, self._trials_left - 1)
                return losses
            undo()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            alone = self._peers.count > 1 and not self.careful
            self._halve(error, alone)
            if alone:
                raise SplitAgain(
                    f"{self._task}: a batch did not fit into this worker's memory; the workers start again with "
                    f"parts of {self.size}."
                )

    def _attempt(self, batch: DeviceBatch, compute: Callable[[DeviceBatch, bool], Losses]) -> tuple[Losses, str]:
        total: Losses = {}
        try:
            parts = list(self.parts(batch))
            for number, part in enumerate(parts, start=1):
                for name, share in compute(part, number == len(parts)).items():
                    total[name] = total[name] + share if name in total else share
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            # Only its text: the error itself would keep the tensors of the failed attempt alive.
            return {}, str(error).splitlines()[0]
        return total, ""

    def _halve(self, error: str, alone: bool) -> None:
        if self.size == 1:
            raise UserError(
                f"{self._task}: a single image does not fit into the memory of the GPU"
                + (f" ({error})" if error else " of another worker")
                + f". Choose a smaller {self._task}.image_size_px or {self._task}.model, or end what else uses the GPU."
            )
        self.size = -(-self.size // 2)
        self._trials_left = _TRIAL_STEPS
        if self._path is not None and (alone or self._peers.rank == 0):
            write_json(self._path, _read(self._path) | {self._task: self.size})
            if self._share is not None:
                self._share(self._path)
        self._say(
            f"{self._task}: a batch of {self._batch_size} a worker does not fit into GPU memory. It is now computed in "
            f"parts of {self.size} whose gradients are added up; the step's batch stays as it was."
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device ran out of memory; libraries say so in several ways."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(name in str(error) for name in _OTHER_NAMES)


def _read(path: Path | None) -> dict[str, int]:
    if path is None:
        return {}
    try:
        sizes = json.loads(path.read_text(encoding="utf-8"))
        return {str(task): int(size) for task, size in sizes.items() if int(size) > 0}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}  # it only saves the first attempts
