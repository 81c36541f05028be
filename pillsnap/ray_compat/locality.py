"""Runs the tasks that make a train worker's batches on that worker's node, as long as it has a core for them.

Ray Data spreads tasks over all nodes, and keeping rows in order turns off what it has for locality. Like `scheduling`,
this touches parts of Ray Data that are not its public interface.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Sequence
from typing import Any

MAKING = "make_batches"
"""In the name of the operator whose tasks make batches."""


class NearWorkers:
    """Which node each read is to be made on: that of the worker whose slot is its first.

    `nodes` are Ray's ids of the workers' nodes, by rank. Tasks end in any order, so the next read's node is often still
    busy when another's is not: the read waits for its own, unless that is far behind. Where there are nodes without
    workers, it does not wait and runs on any that is free: they take what the workers' nodes cannot.
    """

    def __init__(self, nodes: Sequence[str], first_slot: int, slots_per_read: int) -> None:
        self._nodes, self._first_slot, self._slots_per_read = tuple(nodes), first_slot, slots_per_read
        self._placed: dict[int, str] = {}

    def node(self, read: int) -> str:
        """The node of the worker that read number `read` of the stream is for."""
        return self._nodes[(self._first_slot + read * self._slots_per_read) % len(self._nodes)]

    def place(self, read: int, running: Container[int]) -> str:
        """The node to make a read on while the reads in `running` are made: its worker's, or the one with the fewest
        tasks where that has far fewer.
        """
        self._placed = {task: node for task, node in self._placed.items() if task in running}
        tasks = Counter(self._placed.values())
        near, idlest = self.node(read), min(self._nodes, key=lambda node: tasks[node])
        # Half of a node's tasks more or less leave no core idle, since a task reserves less than a core.
        most_more = max(1, len(self._placed) // len(set(self._nodes)) // 2)
        self._placed[read] = near if tasks[near] <= tasks[idlest] + most_more else idlest
        return self._placed[read]

    def attach(self, operators: Any) -> None:
        """Give every task of these operators that makes batches its node."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        spill = self._has_other_nodes()
        for operator in operators:
            if MAKING not in operator.name:
                continue
            original = operator._get_dynamic_ray_remote_args

            def near(input_bundle: Any = None, operator: Any = operator, original: Any = original) -> dict[str, Any]:
                options = original(input_bundle)
                read = operator._next_data_task_idx
                node = self.node(read) if spill else self.place(read, operator._data_tasks)
                options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(
                    node, soft=True, _spill_on_unavailable=spill
                )
                return options

            operator._get_dynamic_ray_remote_args = near

    def _has_other_nodes(self) -> bool:
        import ray

        return any(
            node["Alive"] and node["Resources"].get("CPU") and node["NodeID"] not in self._nodes for node in ray.nodes()
        )


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
