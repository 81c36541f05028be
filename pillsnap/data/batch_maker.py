"""Makes one worker's batch of a slot: plan + recipe + samples + stores -> arrays.

Used by Ray Data tasks and by decode workers, so that both make the same batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from pillsnap.data.plan import Slot, StreamPlan
from pillsnap.data.recipes import Batch, Recipe
from pillsnap.data.sources import KeyMemo, Source, SplitStore
from pillsnap.photos.reader import PhotoReader


@dataclass(frozen=True)
class BatchMaker:
    """The inputs of a batch. `samples` and `stores` are keyed by split: True is training, False is validation."""

    plan: StreamPlan
    recipe: Recipe
    reader: PhotoReader
    samples: Mapping[bool, pa.Table]
    stores: Mapping[bool, SplitStore | None]
    keys: dict[bool, KeyMemo] = field(default_factory=dict)
    """The store keys of each split's samples, computed on demand."""

    def source(self, training: bool) -> Source:
        """Source of the windows of one split: its store, with the shards present now, or the photos."""
        store = self.stores[training]
        if store is None:
            return Source(self.reader)
        return store.source(self.reader, self.keys.setdefault(training, KeyMemo(store.cutter)))

    def make(self, slot: Slot, source: Source, images: np.ndarray | None = None) -> Batch:
        """The batch of a slot, with `epoch`, `training` and `step`.

        `images` (worker_batch_size, size, size, 3) uint8, if given, receives its images.
        """
        samples = self.samples[slot.training]
        batch = self.recipe.make(samples, slot, self.plan.seed, self.plan.worker_batch_size, source, images)
        return batch | slot.position()
