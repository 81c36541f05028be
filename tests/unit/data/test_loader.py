"""From batches of the stream to batches on the device."""

from __future__ import annotations

import numpy as np
import torch

from pillsnap.data.batches import STAGES, Batch
from pillsnap.data.loader import Loader


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


def test_a_device_batch_holds_what_was_made() -> None:
    batches = list(Loader([batch_of(0), batch_of(1)], torch.device("cpu")))
    assert [(batch.epoch, batch.training, batch.step) for batch in batches] == [(1, True, 0), (1, True, 1)]
    second = batches[1]
    assert second.images.shape == (2, 4, 4, 3) and second.images.dtype == torch.uint8 and (second.images == 1).all()
    assert second.num_valid == 1 and second.index.tolist() == [1, -1] and second.quarantine == [("a", "torn")]
    assert sorted(second.targets) == ["label", "valid"] and second.wait_s >= 0
    assert [second.stage_s[name] for name in STAGES] == list(range(len(STAGES)))


def test_a_batch_that_validation_fetched_can_be_trained_on() -> None:
    """On a GPU the first batch of an epoch is fetched while the epoch before is validated."""
    loader = Loader([batch_of(0)], torch.device("cpu"))
    with torch.inference_mode():
        batch = next(loader)
    scores = torch.zeros(2, 2, requires_grad=True)
    torch.nn.functional.cross_entropy(scores + batch.images.float().mean(), batch.targets["label"]).backward()
    assert scores.grad is not None and scores.grad.abs().sum() > 0
    assert not any(tensor.is_inference() for tensor in (batch.images, *batch.targets.values()))
