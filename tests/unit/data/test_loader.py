"""Loader: batches of the stream become batches on the device; waiting is measured."""

from __future__ import annotations

import itertools
import queue
import time
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest
import torch

from pillsnap.data.loader import Loader
from pillsnap.data.recipes import STAGES, Batch


def batch_of(step: int) -> Batch:
    return {
        "image": np.full((2, 4, 4, 3), step, np.uint8),
        "label": np.array([0, 1]),
        "valid": np.array([True, False]),
        "index": np.array([step, -1]),
        "epoch": np.array(1),
        "training": np.array(True),
        "step": np.array(step),
        "quarantine": np.array('[["a", "torn"]]'),
        "stage_s": np.arange(len(STAGES), dtype=float),
    }


@pytest.mark.parametrize("ahead", [False, True])
def test_device_batch_equals_the_batch_of_the_stream(ahead: bool) -> None:
    loader = Loader([batch_of(0), batch_of(1)], torch.device("cpu"), ahead=ahead)
    batches = list(loader)
    assert list(loader) == []
    assert [(batch.epoch, batch.training, batch.step) for batch in batches] == [(1, True, 0), (1, True, 1)]
    second = batches[1]
    assert second.images.shape == (2, 4, 4, 3) and second.images.dtype == torch.uint8 and (second.images == 1).all()
    assert second.num_valid == 1 and second.index.tolist() == [1, -1] and second.quarantine == [("a", "torn")]
    assert sorted(second.targets) == ["label", "valid"]
    assert [second.stage_s[name] for name in STAGES] == list(range(len(STAGES)))


def test_a_batch_that_validation_fetched_can_be_trained_on() -> None:
    """On a GPU the first batch of an epoch is fetched while the epoch before is validated."""
    loader = Loader([batch_of(0), batch_of(1)], torch.device("cpu"), ahead=True)
    with torch.inference_mode():
        next(loader)
    batch = next(loader)
    scores = torch.zeros(2, 2, requires_grad=True)
    torch.nn.functional.cross_entropy(scores + batch.images.float().mean(), batch.targets["label"]).backward()
    assert scores.grad is not None and scores.grad.abs().sum() > 0
    assert not any(tensor.is_inference() for tensor in (batch.images, *batch.targets.values()))


def test_one_batch_is_made_ahead_of_the_loop() -> None:
    begun: queue.SimpleQueue[int] = queue.SimpleQueue()

    def batches() -> Iterator[Batch]:
        for step in range(4):
            begun.put(step)
            yield batch_of(step)

    with closing(Loader(batches(), torch.device("cpu"), ahead=True)) as loader:
        assert begun.get(timeout=10) == 0  # before the first next()
        for step in range(3):
            assert begun.empty() and next(loader).step == step
            assert begun.get(timeout=10) == step + 1


@pytest.mark.parametrize("ahead", [False, True])
def test_wait_s_is_the_time_that_the_loop_waits(ahead: bool) -> None:
    making_s, working_s, steps = 0.05, 0.15, 6

    def batches() -> Iterator[Batch]:
        for step in range(steps):
            time.sleep(making_s)
            yield batch_of(step)

    waits_s = []
    for batch in Loader(batches(), torch.device("cpu"), ahead=ahead):
        waits_s.append(batch.wait_s)
        time.sleep(working_s)
    assert waits_s[0] >= 0.9 * making_s
    waited_s = sum(waits_s[1:])
    if ahead:
        assert waited_s < 0.2 * making_s * (steps - 1)
    else:
        assert 0.9 * making_s * (steps - 1) <= waited_s < 3 * making_s * (steps - 1)


def test_error_is_raised_after_the_batches_before_it() -> None:
    def batches() -> Iterator[Batch]:
        yield batch_of(0)
        raise RuntimeError("torn")

    loader = Loader(batches(), torch.device("cpu"), ahead=True)
    assert next(loader).step == 0
    with pytest.raises(RuntimeError, match="torn"):
        next(loader)


@pytest.mark.parametrize("ahead", [False, True])
def test_batch_that_did_not_fit_is_given_by_the_next_call(ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    copy, calls = Loader._to_device, itertools.count()

    def out_of_memory_thrice(loader: Loader, array: np.ndarray) -> torch.Tensor:
        if next(calls) in (4, 5, 9):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return copy(loader, array)

    monkeypatch.setattr(Loader, "_to_device", out_of_memory_thrice)
    loader = Loader([batch_of(step) for step in range(4)], torch.device("cpu"), ahead=ahead)
    got: list[int | str] = []
    while len(got) < 7:
        try:
            got.append(next(loader).step)
        except torch.OutOfMemoryError:
            got.append("does not fit")
    assert got == [0, "does not fit", "does not fit", 1, "does not fit", 2, 3]
    assert list(loader) == []


@pytest.mark.gpu
def test_pixels_arrive_on_the_gpu_complete_and_in_order() -> None:
    device, images = torch.device("cuda", 0), np.empty((64, 224, 224, 3), np.uint8)
    batches = ({**batch_of(step), "image": np.full_like(images, step)} for step in range(40))
    sums = []
    for batch in Loader(batches, device):
        assert batch.images.device == device and batch.targets["label"].device == device
        sums.append(batch.images.sum(dtype=torch.int64))  # read later, while the next batches are copied
    assert [int(total) for total in sums] == [step * images.size for step in range(40)]
