"""Recipes: sample numbers -> one worker's batch as NumPy arrays. They run in Ray Data tasks and know neither Ray nor
torch.

A batch has always room for `capacity` samples; `valid` says which rows hold one. A photo that cannot be decoded leaves
its row empty and its id and reason in `quarantine`. `stage_s` (3,) has the seconds spent on
each of STAGES.
"""

from __future__ import annotations

import hashlib
import json
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
from pillsnap.data.windows import Codec, Window, crop_window, frame_window
from pillsnap.photos.decode import BadImage

Batch = dict[str, np.ndarray]
Row = dict[str, np.ndarray]
"""What Ray Data hands over: batches of one worker, or what becomes some, behind a first axis of length 1."""
STAGES = ("read", "decode", "warp")
NO_CROP_JITTER = CropJitter()
NO_FRAME_JITTER = FrameJitter()


class Recipe(Cutter, Protocol):
    """Makes one worker's batch of a task."""

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
        """`image` (capacity, size, size, 3) uint8 and `label` (capacity,) int64, beside what every batch has."""
        batch = _Rows(capacity, self.size_px, images)
        labels = np.zeros(capacity, np.int64)
        jitter = self._jitter(slot.training)
        members = slot.members.tolist()
        source.expect(samples, members)
        # Column by column: Arrow takes several microseconds for every single value.
        chosen = samples.select(["sample_id", "label", *([] if self.whole_frame else ["box"])]).take(slot.members)
        labels[: len(members)] = chosen["label"].to_numpy()
        boxes = [None] * len(members) if self.whole_frame else np.array(chosen["box"].to_pylist())
        sample_ids = chosen["sample_id"].to_pylist()
        # Beforehand, since decoding a photo drives the interpreter out of the processor's caches.
        rngs = [augment.sample_rng(seed, slot.epoch, sample_id) for sample_id in sample_ids]
        for row, (number, sample_id, box, rng) in enumerate(zip(members, sample_ids, boxes, rngs, strict=True)):
            window = source.window(samples, number, batch.times)
            if isinstance(window, BadImage):
                batch.reject(row, number, sample_id, window)
                labels[row] = 0
                continue
            if box is None:
                place, margin = np.array((0, 0, window.pixels.shape[1], window.pixels.shape[0])), 0.0
            else:
                place, margin = window.place(box), self.margin
            augment.crop(window.pixels, place, self.size_px, margin, jitter, rng, target=batch.image[row])
            batch.accept(row, number)
        return batch.finish() | {"label": labels}

    def cut(self, photo: np.ndarray, samples: pa.Table, number: int, training: bool, codec: Codec) -> Window:
        """What `make` needs of a photo for one sample."""
        if self.whole_frame:
            return Window(photo) if codec == "png" else frame_window(photo, self.size_px)
        box = np.array(samples["box"][number].as_py())
        return crop_window(photo, box, self.size_px, self.margin, self._jitter(training), codec)

    def keys(self, samples: pa.Table) -> np.ndarray:
        """The window depends on the photo and the box."""
        boxes = [""] * len(samples) if self.whole_frame else samples["box"].to_pylist()
        return _keys(f"{name} {box}" for name, box in zip(samples["sample_id"].to_pylist(), boxes, strict=True))

    def _jitter(self, training: bool) -> CropJitter:
        return self.jitter if training else NO_CROP_JITTER


@dataclass(frozen=True)
class FrameRecipe:
    """Detection: letterboxed frames, or mosaics of neighbours in the epoch's order, with their boxes."""

    size_px: int
    jitter: FrameJitter
    mosaic_group: int
    mosaic_epochs: int
    """Epochs with mosaic; the ones after them close the gap to whole frames."""
    max_boxes: int
    """Most boxes of one photo."""
    mark_incomplete: bool = field(default=False, repr=False)
    """Whether a batch says where its frames show photos with unlabelled pills. No store depends on it."""

    def make(
        self, samples: pa.Table, slot: Slot, seed: int, capacity: int, source: Source, images: np.ndarray | None = None
    ) -> Batch:
        """`image` (capacity, size, size, 3) uint8, `boxes` (capacity, 4 * max_boxes, 4) float32 x, y, w, h in pixels
        of the
        image, and `num_boxes` (capacity,), beside what every batch has. Marked, also `unsure` (capacity, 4, 4) float32
        x, y, w, h: the parts of a frame in which pills may lack a box, empty where there are fewer than four."""
        batch = _Rows(capacity, self.size_px, images)
        boxes = np.zeros((capacity, 4 * self.max_boxes, 4), np.float32)
        num_boxes = np.zeros(capacity, np.int64)
        unsure = np.zeros((capacity, 4, 4), np.float32)
        members = slot.members.tolist()
        source.expect(samples, members)
        windows = [source.window(samples, number, batch.times) for number in members]
        pixels, labels = {}, {}
        for row, (number, window) in enumerate(zip(members, windows, strict=True)):
            if not isinstance(window, BadImage):
                pixels[row] = window.pixels
                labels[row] = window.place(np.array(samples["boxes"][number].as_py(), np.float32).reshape(-1, 4))
        for row, (number, window) in enumerate(zip(members, windows, strict=True)):
            sample_id = samples["sample_id"][number].as_py()
            if isinstance(window, BadImage):
                batch.reject(row, number, sample_id, window)
                continue
            if slot.training:
                rng = augment.sample_rng(seed, slot.epoch, sample_id)
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

    def cut(self, photo: np.ndarray, samples: pa.Table, number: int, training: bool, codec: Codec) -> Window:
        """What `make` needs of a photo: it, reduced by whole halves to no less than the frame."""
        return frame_window(photo, self.size_px)

    def keys(self, samples: pa.Table) -> np.ndarray:
        """The window depends on the photo."""
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
class _Rows:
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
            # Batch normalisation sees every row: copies of the batch's own images keep its statistics what they were.
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
