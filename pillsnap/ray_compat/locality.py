"""Runs the tasks that make a train worker's batches on that worker's node, while it has a core for them.

Ray Data spreads tasks over all nodes, and its own locality is off where rows keep their order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Sequence
from typing import Any


class NearWorkers:
    """Chooses the node of each read: that of the worker that owns its first slot.

    `nodes` are Ray's node ids of the workers, by rank. Tasks end in any order, so the node of the next read may be busy
    while another is free: the read waits for its own node, unless that is far behind. Where nodes without workers
    exist, a read runs on any free node instead of waiting.
    """

    def __init__(self, nodes: Sequence[str], first_slot: int, slots_per_read: int) -> None:
        self._nodes, self._first_slot, self._slots_per_read = tuple(nodes), first_slot, slots_per_read
        self._placed: dict[int, str] = {}

    def node(self, read: int) -> str:
        """The node of the worker that owns the first slot of read number `read`."""
        return self._nodes[(self._first_slot + read * self._slots_per_read) % len(self._nodes)]

    def place(self, read: int, running: Container[int]) -> str:
        """The node of a read while those in `running` run: its worker's, or one with far fewer tasks."""
        self._placed = {task: node for task, node in self._placed.items() if task in running}
        tasks = Counter(self._placed.values())
        near, idlest = self.node(read), min(self._nodes, key=lambda node: tasks[node])
        # A task reserves less than a core: a difference of half of a node's tasks leaves no core idle.
        most_more = max(1, len(self._placed) // len(set(self._nodes)) // 2)
        self._placed[read] = near if tasks[near] <= tasks[idlest] + most_more else idlest
        return self._placed[read]

    def place_tasks_of(self, operator: Any) -> None:
        """Give every task of Ray Data's operator a node."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        spill, original = self._has_other_nodes(), operator._get_dynamic_ray_remote_args

        def with_node(input_bundle: Any = None) -> dict[str, Any]:
            read = operator._next_data_task_idx
            node = self.node(read) if spill else self.place(read, operator._data_tasks)
            strategy = NodeAffinitySchedulingStrategy(node, soft=True, _spill_on_unavailable=spill)
            return {**original(input_bundle), "scheduling_strategy": strategy}

        operator._get_dynamic_ray_remote_args = with_node

    def _has_other_nodes(self) -> bool:
        import ray

        return any(
            node["Alive"] and node["Resources"].get("CPU") and node["NodeID"] not in self._nodes for node in ray.nodes()
        )


def slots_near(nodes: Sequence[str], most: int) -> int:
    """The number of slots of a read, at most `most`, such that one node's workers own all of them."""
    if len(set(nodes)) < 2:
        return most
    for slots in range(min(most, len(nodes)), 1, -1):
        if len(nodes) % slots == 0 and all(
            len(set(nodes[first : first + slots])) == 1 for first in range(0, len(nodes), slots)
        ):
            return slots
    return 1
