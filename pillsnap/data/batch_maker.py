"""Makes one worker's batch of a slot: plan + recipe + samples + stores -> arrays.

Ray Data tasks and the decode workers of a train worker both use it, so a batch is the same wherever it is made.
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
    """Everything that a batch is made from. `samples` and `stores` are keyed by split: True is training, False is
    validation.
    """

    plan: StreamPlan
    recipe: Recipe
    reader: PhotoReader
    samples: Mapping[bool, pa.Table]
    stores: Mapping[bool, SplitStore | None]
    keys: dict[bool, KeyMemo] = field(default_factory=dict)
    """The store keys of each split's samples, as far as they are known."""

    def source(self, training: bool) -> Source:
        """Where the windows of one split come from: its store as it stands now, or the photos."""
        store = self.stores[training]
        if store is None:
            return Source(self.reader)
        return store.source(self.reader, self.keys.setdefault(training, KeyMemo(store.cutter)))

    def make(self, slot: Slot, source: Source, images: np.ndarray | None = None) -> Batch:
        """The batch of a slot, with its position in the stream.

        `images` (worker_batch_size, size, size, 3) uint8, if given, is the memory that its images are written to.
        """
        samples = self.samples[slot.training]
        batch = self.recipe.make(samples, slot, self.plan.seed, self.plan.worker_batch_size, source, images)
        return batch | slot.place()
