"""Recipes: sample numbers -> one worker's batch as NumPy arrays. They run in Ray Data tasks and know neither Ray nor
torch.

A batch has always room for `capacity` samples; `valid` says which rows hold one. A photo that cannot be decoded leaves
its row empty and its id and reason in `quarantine`.
"""

from __future__ import annotations

import json
from collections.abc import Container
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from pillsnap.data import augment
from pillsnap.data.augment import CropJitter, FrameJitter
from pillsnap.data.images import BadImage, decode_image
from pillsnap.data.photos import PhotoStore
from pillsnap.data.plan import Slot

Batch = dict[str, np.ndarray]
NO_CROP_JITTER = CropJitter()
NO_FRAME_JITTER = FrameJitter()


@dataclass(frozen=True)
class PhotoReader:
    """Decoded photos beneath a data root."""

    data_root: str
    max_pixels: int

    def read(self, image_path: str) -> np.ndarray | BadImage:
        """RGB pixels, or why there are none."""
        try:
            return decode_image(PhotoStore(self.data_root).read(image_path), max_pixels=self.max_pixels)
        except BadImage as error:
            return error
        except FileNotFoundError:
            return BadImage("missing", f"{image_path} is not there")
        except (OSError, ValueError) as error:
            return BadImage("unreadable", str(error))


@dataclass(frozen=True)
class CropRecipe:
    """Classification: square crops around labelled pills (or whole frames) with their labels."""

    size_px: int
    margin: float
    jitter: CropJitter
    whole_frame: bool = False

    def make(self, samples: pa.Table, slot: Slot, seed: int, capacity: int, reader: PhotoReader) -> Batch:
        """`image` (capacity, size, size, 3) uint8 and `label` (capacity,) int64, beside what every batch has."""
        batch = _Rows(capacity, self.size_px)
        labels = np.zeros(capacity, np.int64)
        jitter = self.jitter if slot.training else NO_CROP_JITTER
        for row, number in enumerate(slot.members):
            sample_id, box = samples["sample_id"][number].as_py(), samples["box"][number].as_py()
            photo = reader.read(samples["image_path"][number].as_py())
            if isinstance(photo, BadImage):
                batch.reject(row, number, sample_id, photo)
                continue
            rng = augment.sample_rng(seed, slot.epoch, sample_id)
            if self.whole_frame:
                box = (0, 0, photo.shape[1], photo.shape[0])
            margin = 0.0 if self.whole_frame else self.margin
            batch.accept(row, number, augment.crop(photo, np.asarray(box), self.size_px, margin, jitter, rng))
            labels[row] = samples["label"][number].as_py()
        return batch.finish() | {"label": labels}


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

    def make(self, samples: pa.Table, slot: Slot, seed: int, capacity: int, reader: PhotoReader) -> Batch:
        """`image` (capacity, size, size, 3) uint8, `boxes` (capacity, 4 * max_boxes, 4) float32 x, y, w, h in pixels
        of the
        image, and `num_boxes` (capacity,), beside what every batch has."""
        batch = _Rows(capacity, self.size_px)
        boxes = np.zeros((capacity, 4 * self.max_boxes, 4), np.float32)
        num_boxes = np.zeros(capacity, np.int64)
        photos = [reader.read(samples["image_path"][number].as_py()) for number in slot.members]
        labels = [np.array(samples["boxes"][number].as_py(), np.float32).reshape(-1, 4) for number in slot.members]
        pixels = {row: photo for row, photo in enumerate(photos) if not isinstance(photo, BadImage)}
        for row, number in enumerate(slot.members):
            sample_id = samples["sample_id"][number].as_py()
            photo = photos[row]
            if isinstance(photo, BadImage):
                batch.reject(row, number, sample_id, photo)
                continue
            if slot.training:
                rng = augment.sample_rng(seed, slot.epoch, sample_id)
                rows = self._tiles(row, pixels, slot.epoch, rng)
                image, seen = augment.frame_sample(
                    [pixels[r] for r in rows], [labels[r] for r in rows], self.size_px, self.jitter, rng
                )
            else:
                image = augment.letterbox(photo, self.size_px)
                matrix = augment.letterbox_matrix(photo.shape[1], photo.shape[0], self.size_px)
                seen = augment.transform_boxes(labels[row], matrix)
            batch.accept(row, number, image)
            boxes[row, : len(seen)] = seen
            num_boxes[row] = len(seen)
        return batch.finish() | {"boxes": boxes, "num_boxes": num_boxes}

    def _tiles(self, row: int, readable: Container[int], epoch: int, rng: np.random.Generator) -> list[int]:
        if epoch >= self.mosaic_epochs or rng.random() >= self.jitter.mosaic:
            return [row]
        first = row - row % self.mosaic_group
        group = [r for r in range(first, first + self.mosaic_group) if r in readable]
        rows = [row, *(group[i] for i in rng.integers(len(group), size=3))]
        rng.shuffle(rows)
        return rows


@dataclass
class _Rows:
    capacity: int
    size_px: int
    image: np.ndarray = field(init=False)
    index: np.ndarray = field(init=False)
    valid: np.ndarray = field(init=False)
    quarantine: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.image = np.empty((self.capacity, self.size_px, self.size_px, 3), np.uint8)
        self.index = np.full(self.capacity, -1, np.int64)
        self.valid = np.zeros(self.capacity, bool)

    def accept(self, row: int, number: int, image: np.ndarray) -> None:
        self.image[row], self.index[row], self.valid[row] = image, number, True

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
        }
