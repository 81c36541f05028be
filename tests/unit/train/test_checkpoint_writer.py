"""What workers agree on is acted on by all at the same step, also where the answer comes some steps later."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from pillsnap.runs.checkpoint import Position
from pillsnap.train.checkpoint_writer import Saver


class LatePeers:
    """Two workers on GPUs, whose sums are read two steps after they were begun; this is the second of them."""

    rank, count, lag_steps = 1, 2, 2

    def sum_later(self, values: torch.Tensor) -> Any:
        return values.tolist  # of the moment of the question

    def gather(self, items: list[Any]) -> list[Any]:
        return items


def test_a_wish_is_granted_two_steps_later_and_once() -> None:
    asked = {"stop": False}
    job: Any = SimpleNamespace(
        stop_requested=lambda: asked["stop"], preempted=lambda: False, train=SimpleNamespace(checkpoint_minutes=10.0),
        report=lambda metrics: None, publish=None,
    )  # fmt: skip
    peers: Any = LatePeers()
    saver = Saver(job, peers, state=None, log=None)  # type: ignore[arg-type]
    assert [saver.wishes().stop for _ in range(4)] == [False] * 4
    asked["stop"] = True
    assert [saver.wishes().stop for _ in range(3)] == [False, False, True]
    asked["stop"] = False
    saver.save(Position(0, 7, 7), {}, best=False)
    # Two more questions were on their way when the checkpoint was written: they are answered by it.
    assert [saver.wishes().any for _ in range(4)] == [False] * 4
