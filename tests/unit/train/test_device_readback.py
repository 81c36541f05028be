"""Figures that the host reads a few steps later."""

from __future__ import annotations

import pytest
import torch

from pillsnap.train import device_readback
from pillsnap.train.device_readback import Readings, lag_steps

CPU = torch.device("cpu")


def test_on_a_cpu_they_are_there_at_once() -> None:
    figures: Readings[str] = Readings(CPU)
    figures.send(torch.tensor([1.0, 2.0]), "first")
    assert list(figures.due()) == [("first", [1.0, 2.0])]
    assert list(figures.due()) == [] == list(figures.all())


def test_with_a_lag_they_come_in_order_and_none_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lag_steps(torch.device("cuda", 0)) == 2
    monkeypatch.setattr(device_readback, "lag_steps", lambda device: 2)
    figures: Readings[int] = Readings(CPU)
    read = []
    for step in range(5):
        figures.send(torch.tensor([float(step)]), step)
        read.append([of for of, _ in figures.due()])
    assert read == [[], [], [0], [1], [2]]
    assert list(figures.all()) == [(3, [3.0]), (4, [4.0])]
