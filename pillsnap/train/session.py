"""Ray for one command: an existing cluster when there is one, else a local one that ends with the command."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from pillsnap.config import Settings
from pillsnap.errors import UserError


@contextmanager
def ray_session() -> Iterator[None]:
    """Connect to the cluster of RAY_ADDRESS, or start one on this machine and shut it down at the end."""
    import ray

    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    quiet = {"env_vars": {"RAY_TRAIN_ENABLE_STATE_TRACKING": "0", "YOLO_AUTOINSTALL": "False"}}
    options = {"log_to_driver": False, "logging_level": logging.ERROR, "runtime_env": quiet}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(address="auto", **options)
    else:
        # Without its dashboard Ray Train's placement-group cleaner warns every few seconds: keep it, on loopback.
        ray.init(
            address="local", _node_ip_address="127.0.0.1", include_dashboard=True, dashboard_host="127.0.0.1", **options
        )
    import ray.data
    import ray.train

    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


def count_workers(settings: Settings) -> tuple[int, bool]:
    """How many train workers to start, and whether each gets a GPU. Raises UserError when the cluster cannot hold
    them.
    """
    import ray

    resources = ray.cluster_resources()
    num_gpus, num_cpus = int(resources.get("GPU", 0)), resources.get("CPU", 0.0)
    workers = settings.train.num_workers
    count = max(1, num_gpus) if workers == "auto" else int(workers)
    use_gpu = num_gpus > 0
    if use_gpu and count > num_gpus:
        raise UserError(
            f"{count} workers were asked for, but Ray has {num_gpus} GPUs: set --num-workers to {num_gpus} or 'auto'."
        )
    left = num_cpus - count * settings.train.cpus_per_worker
    if left < settings.data.decoding_cpus:
        raise UserError(
            f"{count} workers with {settings.train.cpus_per_worker} CPUs each leave {left:.2f} of {num_cpus:.0f} CPUs, "
            f"and one decoding task needs {settings.data.decoding_cpus}: "
            "lower --num-workers, train.cpus_per_worker or data.decoding_cpus."
        )
    for task in settings.tasks:
        batch_size = getattr(settings, task).batch_size
        if batch_size % count:
            raise UserError(
                f"{task}.batch_size {batch_size} cannot be shared by {count} workers evenly: "
                f"choose a multiple of {count}."
            )
    return count, use_gpu
