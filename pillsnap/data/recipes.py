"""Recipes: sample numbers -> one worker's batch as NumPy arrays, without Ray or torch.

Fields of every batch: `image` (capacity, size, size, 3) uint8; `index` (capacity,) sample numbers, -1 in rows without
one; `valid` (capacity,) bool; `quarantine`, JSON [[sample id, reason]] of photos that could not be decoded, whose rows
are not valid; `stage_s` (3,) seconds of each of STAGES.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Container, Iterable
from dataclasses import InitVar, dataclass, field
from typing import Protocol

import numpy as np
import pyarrow as pa

from pillsnap.data import augment
from pillsnap.data.augment import CropJitter, FrameJitter
from pillsnap.data.plan import Slot
from pillsnap.data.sources import Cutter, FetchTimes, Source
from pillsnap.data.windows import Codec, Window, crop_scale, crop_window, frame_scale, frame_window
from pillsnap.photos.decode import BadImage, Scale

Batch = dict[str, np.ndarray]
Row = dict[str, np.ndarray]
"""One row of Ray Data: packed or stacked batches of one worker (see packing.py), behind a first axis of length 1."""
STAGES = ("read", "decode", "warp")
NO_CROP_JITTER = CropJitter()


class Recipe(Cutter, Protocol):
    """Makes batches of a task, and cuts its windows."""

    @property
    def size_px(self) -> int: ...

    def make(
        self, samples: pa.Table, slot: Slot, seed: int, capacity: int, source: Source, images: np.ndarray | None = None
    ) -> Batch: ...


@dataclass(frozen=True)
class CropRecipe:
    """Classification: square crops around labelled pills (or whole frames) with their labels."""

    size_px: int
    margin: float
    jitter: CropJitter
    whole_frame: bool = False

    def make(
        self, samples: pa.Table, slot: Slot, seed: int, capacity: int, source: Source, images: np.ndarray | None = None
    ) -> Batch:
        """`label` (capacity,) int64 and the fields of every batch."""
        batch = _BatchBuilder(capacity, self.size_px, images)
        labels = np.zeros(capacity, np.int64)
        jitter = self._jitter(slot.training)
        members = slot.members.tolist()
        source.prefetch(samples, members)
        # By column: Arrow needs several microseconds per single value.
        chosen = samples.select(["sample_id", "label", *([] if self.whole_frame else ["box"])]).take(slot.members)
        labels[: len(members)] = chosen["label"].to_numpy()
        boxes = [None] * len(members) if self.whole_frame else np.array(chosen["box"].to_pylist())
        sample_ids = chosen["sample_id"].to_pylist()
        # Before decoding, which evicts the interpreter from the CPU caches.
        rngs = [augment.sample_rng(seed, *key) for key in zip(slot.passes.tolist(), sample_ids, strict=True)]
        for row, (number, sample_id, box, rng) in enumerate(zip(members, sample_ids, boxes, rngs, strict=True)):
            window = source.window(samples, number, batch.times, self._scale(box, jitter))
            if isinstance(window, BadImage):
                batch.reject(row, number, sample_id, window)
                labels[row] = 0
                continue
            if box is None:
                target_box, margin = np.array((0, 0, window.pixels.shape[1], window.pixels.shape[0])), 0.0
            else:
                target_box, margin = window.map_boxes(box), self.margin
            augment.crop(window.pixels, target_box, self.size_px, margin, jitter, rng, target=batch.image[row])
            batch.accept(row, number)
        return batch.finish() | {"label": labels}

    def needed(self, samples: pa.Table, number: int, training: bool) -> Scale:
        """What `make` needs of the photo of one sample."""
        box = None if self.whole_frame else samples["box"][number].as_py()
        return self._scale(box, self._jitter(training))

    def cut(self, photo: Window, samples: pa.Table, number: int, training: bool, codec: Codec) -> Window:
        """The part of a photo that `make` needs for one sample."""
        if self.whole_frame:
            return photo if codec == "png" else frame_window(photo, self.size_px)
        box = np.array(samples["box"][number].as_py())
        return crop_window(photo, box, self.size_px, self.margin, self._jitter(training), codec)

    def keys(self, samples: pa.Table) -> np.ndarray:
        """Keys of photo and box, which determine the window."""
        boxes = [""] * len(samples) if self.whole_frame else samples["box"].to_pylist()
        return _keys(f"{name} {box}" for name, box in zip(samples["sample_id"].to_pylist(), boxes, strict=True))

    def _jitter(self, training: bool) -> CropJitter:
        return self.jitter if training else NO_CROP_JITTER

    def _scale(self, box: np.ndarray | list[float] | None, jitter: CropJitter) -> Scale:
        if box is None:
            return frame_scale(self.size_px, math.exp(jitter.scale))
        return crop_scale(box, self.size_px, self.margin, jitter)


@dataclass(frozen=True)
class FrameRecipe:
    """Detection: letterboxed frames, or mosaics of samples of the same batch, with their boxes."""

    size_px: int
    jitter: FrameJitter
    mosaic_group: int
    """Mosaics are made within groups of this many consecutive rows of a batch."""
    mosaic_epochs: int
    """Number of epochs with mosaic; the epochs after them train on whole frames."""
    max_boxes: int
    """Maximum number of boxes of one photo."""
    mark_incomplete: bool = field(default=False, repr=False)
    """Whether batches have `unsure`. Not in `repr`, which names the store: windows do not depend on it."""

    def make(
        self, samples: pa.Table, slot: Slot, seed: int, capacity: int, source: Source, images: np.ndarray | None = None
    ) -> Batch:
        """`boxes` (capacity, 4 * max_boxes, 4) float32 x, y, w, h in pixels of the image, `num_boxes` (capacity,) and
        the fields of every batch. With `mark_incomplete` also `unsure` (capacity, 4, 4) float32 x, y, w, h: the areas
        of a frame that show photos with unlabelled pills, zeros in unused entries.
        """
        batch = _BatchBuilder(capacity, self.size_px, images)
        boxes = np.zeros((capacity, 4 * self.max_boxes, 4), np.float32)
        num_boxes = np.zeros(capacity, np.int64)
        unsure = np.zeros((capacity, 4, 4), np.float32)
        members = slot.members.tolist()
        source.prefetch(samples, members)
        scale = self.needed(samples, 0, slot.training)
        windows = [source.window(samples, number, batch.times, scale) for number in members]
        pixels, labels = {}, {}
        for row, (number, window) in enumerate(zip(members, windows, strict=True)):
            if not isinstance(window, BadImage):
                pixels[row] = window.pixels
                labels[row] = window.map_boxes(np.array(samples["boxes"][number].as_py(), np.float32).reshape(-1, 4))
        for row, (number, window) in enumerate(zip(members, windows, strict=True)):
            sample_id = samples["sample_id"][number].as_py()
            if isinstance(window, BadImage):
                batch.reject(row, number, sample_id, window)
                continue
            if slot.training:
                rng = augment.sample_rng(seed, int(slot.passes[row]), sample_id)
                rows = self._tiles(row, pixels, slot.epoch, rng)
                maps: list[np.ndarray] = []
                batch.image[row], seen = augment.frame_sample(
                    [pixels[r] for r in rows], [labels[r] for r in rows], self.size_px, self.jitter, rng, maps
                )
                for tile, r in enumerate(rows if self.mark_incomplete else []):
                    if not samples["complete"][members[r]].as_py():
                        height, width = pixels[r].shape[:2]
                        unsure[row, tile] = augment.area_in_frame(width, height, maps[tile], self.size_px)
            else:
                height, width = pixels[row].shape[:2]
                batch.image[row] = augment.letterbox(pixels[row], self.size_px)
                seen = augment.transform_boxes(labels[row], augment.letterbox_matrix(width, height, self.size_px))
            batch.accept(row, number)
            boxes[row, : len(seen)] = seen
            num_boxes[row] = len(seen)
        marked = {"unsure": unsure} if self.mark_incomplete else {}
        return batch.finish() | {"boxes": boxes, "num_boxes": num_boxes} | marked

    def needed(self, samples: pa.Table, number: int, training: bool) -> Scale:
        """What `make` needs of any photo."""
        return frame_scale(self.size_px, 1 + self.jitter.scale if training else 1.0)

    def cut(self, photo: Window, samples: pa.Table, number: int, training: bool, codec: Codec) -> Window:
        """The photo, halved while its longer side stays at least `size_px`."""
        return frame_window(photo, self.size_px)

    def keys(self, samples: pa.Table) -> np.ndarray:
        """Keys of the photo, which determines the window."""
        return _keys(samples["sample_id"].to_pylist())

    def _tiles(self, row: int, readable: Container[int], epoch: int, rng: np.random.Generator) -> list[int]:
        if epoch >= self.mosaic_epochs or rng.random() >= self.jitter.mosaic:
            return [row]
        first = row - row % self.mosaic_group
        group = [r for r in range(first, first + self.mosaic_group) if r in readable]
        rows = [row, *(group[i] for i in rng.integers(len(group), size=3))]
        rng.shuffle(rows)
        return rows


def _keys(names: Iterable[str]) -> np.ndarray:
    return np.frombuffer(b"".join(hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names), "<u8")


@dataclass
class _BatchBuilder:
    """Collects the rows of a batch; images go to `images` if given."""

    capacity: int
    size_px: int
    images: InitVar[np.ndarray | None]
    image: np.ndarray = field(init=False)
    index: np.ndarray = field(init=False)
    valid: np.ndarray = field(init=False)
    quarantine: list[tuple[str, str]] = field(default_factory=list)
    times: FetchTimes = field(default_factory=FetchTimes)
    started_s: float = field(default_factory=time.perf_counter)

    def __post_init__(self, images: np.ndarray | None) -> None:
        shape = (self.capacity, self.size_px, self.size_px, 3)
        self.image = np.empty(shape, np.uint8) if images is None else images
        self.index = np.full(self.capacity, -1, np.int64)
        self.valid = np.zeros(self.capacity, bool)

    def accept(self, row: int, number: int) -> None:
        self.index[row], self.valid[row] = number, True

    def reject(self, row: int, number: int, sample_id: str, why: BadImage) -> None:
        self.index[row] = number
        self.quarantine.append((sample_id, str(why)))

    def finish(self) -> Batch:
        filled = np.flatnonzero(self.valid)
        if len(filled):
            # Batch normalisation averages over all rows: copies of the valid images keep its statistics realistic.
            empty = np.flatnonzero(~self.valid)
            self.image[empty] = self.image[filled[np.arange(len(empty)) % len(filled)]]
        else:
            self.image[:] = augment.PADDING_GREY
        return {
            "image": self.image,
            "index": self.index,
            "valid": self.valid,
            "quarantine": np.array(json.dumps(self.quarantine, ensure_ascii=False)),
            "stage_s": self._stage_s(),
        }

    def _stage_s(self) -> np.ndarray:
        read_s, decode_s = self.times.read_s, self.times.decode_s
        return np.array([read_s, decode_s, time.perf_counter() - self.started_s - read_s - decode_s])
