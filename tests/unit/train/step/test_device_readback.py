"""Values are read in order, with the lag of the device."""

from __future__ import annotations

import pytest
import torch

from pillsnap.train.step import device_readback
from pillsnap.train.step.device_readback import DeviceReadback, lag_steps

CPU = torch.device("cpu")


def test_cpu_values_are_due_at_once() -> None:
    readback: DeviceReadback[str] = DeviceReadback(CPU)
    readback.send(torch.tensor([1.0, 2.0]), "first")
    assert list(readback.due()) == [("first", [1.0, 2.0])]
    assert list(readback.due()) == [] == list(readback.all())


def test_lagged_values_come_in_order_and_none_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lag_steps(torch.device("cuda", 0)) == 2
    monkeypatch.setattr(device_readback, "lag_steps", lambda device: 2)
    readback: DeviceReadback[int] = DeviceReadback(CPU)
    read = []
    for step in range(5):
        readback.send(torch.tensor([float(step)]), step)
        read.append([context for context, _ in readback.due()])
    assert read == [[], [], [0], [1], [2]]
    assert list(readback.all()) == [(3, [3.0]), (4, [4.0])]
