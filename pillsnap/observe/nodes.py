"""Writes what every node of a run is doing into its event log, from a thread of the driver."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

from pillsnap.observe import telemetry
from pillsnap.observe.events import EventLog

INTERVAL_S = 15.0
ANSWER_TIMEOUT_S = 5.0

_log = logging.getLogger(__name__)


class NodeWatch:
    """A `system` event a node, every `interval_s` while the `with` block lasts. Ray must be up.

    The driver's own node is read in place, every other one by an actor that reserves nothing. Nodes may come and go; a
    fault is logged, costs a reading, and never reaches training.
    """

    def __init__(self, events: EventLog, run_dir: Path, interval_s: float = INTERVAL_S) -> None:
        self.events, self.run_dir, self.interval_s = events, run_dir, interval_s
        self._samplers: dict[str, Any] = {}  # Ray's node id -> actor
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nodes", daemon=True)

    def __enter__(self) -> NodeWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=2 * ANSWER_TIMEOUT_S)

    def _run(self) -> None:
        telemetry.sample(self.run_dir)  # the processor's share is that since the last reading
        while not self._stop.wait(self.interval_s):
            try:
                for reading in (telemetry.sample(self.run_dir), *self._others()):
                    self.events.write("system", **reading)
            except (
                Exception
            ):  # Ray may be shutting down, or a node dying: training goes on, and so does the next reading
                _log.warning("a reading of the nodes failed; training goes on", exc_info=True)

    def _others(self) -> list[dict[str, Any]]:
        import ray

        own = ray.get_runtime_context().get_node_id()
        there = {node["NodeID"] for node in ray.nodes() if node["Alive"]} - {own}
        self._samplers = {node: actor for node, actor in self._samplers.items() if node in there}
        for node in there - set(self._samplers):
            self._samplers[node] = _start_sampler(node)
        asked = {actor.sample.remote(str(self.run_dir)): node for node, actor in self._samplers.items()}
        readings = []
        for answer in ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_TIMEOUT_S)[0] if asked else []:
            try:
                readings.append(ray.get(answer))
            except ray.exceptions.RayError:
                del self._samplers[asked[answer]]  # its node may come back: the next reading starts another
        return readings


def _start_sampler(node_id: str) -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(num_cpus=0, max_restarts=0, scheduling_strategy=here)(_Sampler).remote()


class _Sampler:
    def sample(self, run_dir: str) -> dict[str, Any]:
        path = Path(run_dir)
        return telemetry.sample(path if path.exists() else Path("/"))
