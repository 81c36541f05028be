"""Records the load of every node of a run as `system` events, from a thread of the driver."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

from pillsnap.observe import telemetry
from pillsnap.observe.events import EventLog

INTERVAL_S = 15.0
SAMPLE_TIMEOUT_S = 5.0

_log = logging.getLogger(__name__)


class NodeTelemetry:
    """Writes one `system` event per node every `interval_s` within the `with` block. Ray must be initialized.

    The driver's node is sampled in this process, every other node by an actor without reserved resources. Nodes may
    join and leave. An error is logged and skips one sample; it does not affect training.
    """

    def __init__(self, events: EventLog, run_dir: Path, interval_s: float = INTERVAL_S) -> None:
        self.events, self.run_dir, self.interval_s = events, run_dir, interval_s
        self._samplers: dict[str, Any] = {}  # Ray node id -> actor
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nodes", daemon=True)

    def __enter__(self) -> NodeTelemetry:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=2 * SAMPLE_TIMEOUT_S)

    def _run(self) -> None:
        telemetry.sample(self.run_dir)  # cpu_fraction covers the time since the previous sample
        while not self._stop.wait(self.interval_s):
            try:
                for sample in (telemetry.sample(self.run_dir), *self._others()):
                    self.events.write("system", **sample)
            except Exception:  # Ray may be shutting down, or a node may have failed
                _log.warning("sampling the nodes failed; training continues", exc_info=True)

    def _others(self) -> list[dict[str, Any]]:
        import ray

        own = ray.get_runtime_context().get_node_id()
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]} - {own}
        self._samplers = {node: actor for node, actor in self._samplers.items() if node in alive}
        for node in alive - set(self._samplers):
            self._samplers[node] = _start_sampler(node)
        pending = {actor.sample.remote(str(self.run_dir)): node for node, actor in self._samplers.items()}
        samples = []
        for ref in ray.wait(list(pending), num_returns=len(pending), timeout=SAMPLE_TIMEOUT_S)[0] if pending else []:
            try:
                samples.append(ray.get(ref))
            except ray.exceptions.RayError:
                del self._samplers[pending[ref]]  # started again if the node is still alive
        return samples


def _start_sampler(node_id: str) -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    on_node = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(num_cpus=0, max_restarts=0, scheduling_strategy=on_node)(_Sampler).remote()


class _Sampler:
    def sample(self, run_dir: str) -> dict[str, Any]:
        path = Path(run_dir)
        return telemetry.sample(path if path.exists() else Path("/"))
