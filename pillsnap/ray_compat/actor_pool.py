"""A pool of actors that takes the rows of a dataset one after the other."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from pillsnap.ray_compat import capabilities

if TYPE_CHECKING:
    from ray.data import Dataset


def map_in_actors(dataset: Dataset, actor: type, *arguments: Any, size: int, in_flight: int, **options: Any) -> Dataset:
    """`dataset.map_batches` in `size` actors, each made from `arguments`, with `in_flight` tasks each.

    Where Ray accepts it, an actor runs its tasks in order: else it may make its second read before the first, which
    delays the first batch, but not the order of rows.
    """
    from ray.data import ActorPoolStrategy
    from ray.util.annotations import RayDeprecationWarning

    if capabilities.ordered_actors():
        options["allow_out_of_order_execution"] = False
    pool = ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=in_flight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RayDeprecationWarning)  # Ray 2.60 has no other name for that option
        return dataset.map_batches(actor, fn_constructor_args=arguments, compute=pool, **options)
