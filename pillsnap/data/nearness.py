"""Runs the tasks that make a train worker's batches on that worker's node, as long as it has a core for them.

Ray Data spreads tasks over all nodes, and keeping rows in order turns off what it has for locality. Like `scheduling`,
this touches parts of Ray Data that are not its public interface.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

MAKING = "make_batches"
"""In the name of the operator whose tasks make batches."""


class NearWorkers:
    """Which node each read is to be made on: that of the worker whose slot is its first.

    `nodes` are Ray's ids of the workers' nodes, by rank. Where a node has no core free, its task runs on any other: so
    nodes without a GPU take what the workers' nodes cannot.
    """

    def __init__(self, nodes: Sequence[str], first_slot: int, slots_per_read: int) -> None:
        self._nodes, self._first_slot, self._slots_per_read = tuple(nodes), first_slot, slots_per_read

    def node(self, read: int) -> str:
        """The node for read number `read` of the stream."""
        return self._nodes[(self._first_slot + read * self._slots_per_read) % len(self._nodes)]

    def attach(self, operators: Any) -> None:
        """Give every task of these operators that makes batches its node."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        for operator in operators:
            if MAKING not in operator.name:
                continue
            original = operator._get_dynamic_ray_remote_args

            def near(input_bundle: Any = None, operator: Any = operator, original: Any = original) -> dict[str, Any]:
                options = original(input_bundle)
                node = self.node(operator._next_data_task_idx)
                options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(
                    node, soft=True, _spill_on_unavailable=True
                )
                return options

            operator._get_dynamic_ray_remote_args = near


def slots_near(nodes: Sequence[str], most: int) -> int:
    """How many slots a read may have, `most` or fewer, so that all are of workers on one node."""
    if len(set(nodes)) < 2:
        return most
    for slots in range(min(most, len(nodes)), 1, -1):
        if len(nodes) % slots == 0 and all(
            len(set(nodes[first : first + slots])) == 1 for first in range(0, len(nodes), slots)
        ):
            return slots
    return 1
