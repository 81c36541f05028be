"""Batches of the stream -> batches on the device, with the time that the loop waits for each.

The training loop sees Ray Data only through `Loader`, so any iterable of batches can replace the stream.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from pillsnap.data.recipes import STAGES, Batch

_HOST_FIELDS = ("index", "quarantine", "epoch", "training", "step", "stage_s")


@dataclass
class DeviceBatch:
    """One worker's share of a step, on its device."""

    epoch: int
    training: bool
    step: int
    images: torch.Tensor
    """(capacity, height, width, 3) uint8."""
    targets: dict[str, torch.Tensor]
    """The recipe's other arrays, `valid` among them."""
    index: np.ndarray
    """(capacity,) sample numbers, -1 in rows without a sample."""
    num_valid: int
    """Number of rows with a sample, marked in `targets["valid"]`."""
    loss_weights: torch.Tensor | None = None
    """In a part of a batch whose loss is not a sum over samples: factors on the part's mean loss, set by its task."""
    quarantine: list[tuple[str, str]] = field(default_factory=list)
    """(sample id, reason) of photos that could not be decoded."""
    wait_s: float = 0.0
    """Time the training loop waited for this batch."""
    stage_s: dict[str, float] = field(default_factory=dict)
    """Seconds to `read`, `decode` and `warp` this batch where it was made, and to `hand_over` to the device."""


class Loader:
    """Iterates over device batches. With `ahead` (default: on a GPU) a thread prepares the next batch during a step:
    pinned memory, copied on a side stream. The thread does not inherit inference_mode from a loop that validates.

    A batch that could not be copied, for lack of memory on the device, is given by the next call of `next`.
    """

    def __init__(self, batches: Iterable[Batch], device: torch.device, *, ahead: bool | None = None) -> None:
        self._batches = iter(batches)
        self._uncopied: Batch | None = None
        self._device = device
        self._copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread: ThreadPoolExecutor | None = None
        if ahead is None:
            ahead = device.type == "cuda"
        if ahead:
            self._thread = ThreadPoolExecutor(1, "loader", initializer=self._choose_device)
            self._next: Future[DeviceBatch] | None = self._thread.submit(self._load)

    def __iter__(self) -> Iterator[DeviceBatch]:
        return self

    def __next__(self) -> DeviceBatch:
        started = time.perf_counter()
        if self._thread is None:
            batch = self._load()
        else:
            # After an error, the caller has freed memory: not before this call is the batch copied again.
            ready, self._next = self._next or self._thread.submit(self._load), None
            batch = ready.result()
            if self._copy_stream is not None:
                torch.cuda.current_stream().wait_stream(self._copy_stream)
                for tensor in (batch.images, *batch.targets.values()):
                    tensor.record_stream(torch.cuda.current_stream())
            self._next = self._thread.submit(self._load)
        batch.wait_s = time.perf_counter() - started
        return batch

    def close(self) -> None:
        """Stop preparing batches."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)

    def _choose_device(self) -> None:
        if self._copy_stream is not None:  # a thread starts with GPU 0, which would own the pinned memory
            torch.cuda.set_device(self._device)

    def _load(self) -> DeviceBatch:
        if self._uncopied is None:
            self._uncopied = next(self._batches)
        batch = self._uncopied
        started_s = time.perf_counter()
        tensors = {name: self._to_device(value) for name, value in batch.items() if name not in _HOST_FIELDS}
        self._uncopied = None
        return DeviceBatch(
            epoch=int(batch["epoch"]),
            training=bool(batch["training"]),
            step=int(batch["step"]),
            images=tensors.pop("image"),
            targets=tensors,
            index=np.array(batch["index"]),
            num_valid=int(batch["valid"].sum()),
            quarantine=[(sample_id, reason) for sample_id, reason in json.loads(str(batch["quarantine"]))],
            stage_s=dict(zip(STAGES, batch["stage_s"].tolist(), strict=True))
            | {"hand_over": time.perf_counter() - started_s},
        )

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        if self._copy_stream is None:
            if array.flags.writeable:
                return torch.from_numpy(array)
            with warnings.catch_warnings():
                # Rows from Ray Data are read-only views into the object store; nothing writes to a batch.
                warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
                return torch.from_numpy(array)
        pinned = torch.empty(array.shape, dtype=_torch_dtype(array), pin_memory=True)
        np.copyto(pinned.numpy(), array)
        with torch.cuda.stream(self._copy_stream):
            return pinned.to(self._device, non_blocking=True)


def _torch_dtype(array: np.ndarray) -> torch.dtype:
    return torch.from_numpy(np.empty(0, array.dtype)).dtype
