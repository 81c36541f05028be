"""The photos that all loaders read, and the same crops in the format of each loader."""

from __future__ import annotations

import io
import json
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa

from pillsnap.config import load_settings
from pillsnap.data import augment
from pillsnap.data.augment import CropJitter
from pillsnap.data.fill_store import fill, split_stores
from pillsnap.data.recipes import CropRecipe, FrameRecipe
from pillsnap.data.samples import TaskSamples
from pillsnap.data.sources import SplitStore
from pillsnap.manifest.build import build_manifest
from pillsnap.manifest.table import manifest_hash, read_classes, read_manifest
from pillsnap.photos.decode import read_header
from pillsnap.photos.reader import PhotoReader
from pillsnap.synthetic import generate
from pillsnap.tasks.detection import DetectionTask
from pillsnap.tasks.registry import make_task

SIZE_PX, FRAME_PX, BATCH, FRAME_BATCH = 224, 640, 64, 16
MARGIN = 0.12
CORES = os.cpu_count() or 1
PHOTO_REPEATS = max(1, CORES // 2)
"""Repetitions of each photo per epoch, so that an epoch takes seconds."""
STORE_REPEATS = 8 * PHOTO_REPEATS
"""Repetitions of each prepared crop per epoch."""
LEAST_PHOTOS = 800
"""Photos are repeated up to this number per epoch: an epoch of a few is less than one batch per process."""
# Geometry only: colour augmentation differs between loaders.
JITTER = CropJitter(0.06, 0.12, 180.0)
RECIPE = CropRecipe(SIZE_PX, MARGIN, JITTER)


@dataclass(frozen=True)
class Prepared:
    """The folder of all prepared data, read by the process of every loader."""

    folder: Path

    @property
    def photos(self) -> Path:
        return self.folder / "photos"

    def crop_samples(self) -> pa.Table:
        return self._samples("classification").train

    def frame_samples(self) -> pa.Table:
        return self._samples("detection").train

    def photo_repeats(self) -> int:
        """Repetitions of each photo per epoch."""
        return PHOTO_REPEATS * -(-LEAST_PHOTOS // len(self.crop_samples()))

    def reader(self) -> PhotoReader:
        return PhotoReader(str(self.photos), 64_000_000)

    def store(self) -> SplitStore:
        run = self.folder / "run"
        return split_stores(str(run / "store"), "classification", RECIPE, "jpeg", manifest_hash(run))["train"]

    def frame_recipe(self) -> FrameRecipe:
        task = make_task("detection", load_settings("stage3"), [])
        assert isinstance(task, DetectionTask)
        return task.recipe(self._samples("detection"))

    def jpegs(self) -> list[Path]:
        return sorted((self.folder / "crops").glob("*.jpg"))

    def boxes(self) -> np.ndarray:
        """(n, 4) x, y, w, h of each crop's pill, in pixels of the crop's JPEG."""
        return np.load(self.folder / "boxes.npy")

    def _samples(self, task: str) -> TaskSamples:
        run = self.folder / "run"
        codes = [entry.code for entry in read_classes(run)]
        return make_task(task, load_settings("stage3"), codes).samples(read_manifest(run), None)


def prepare(folder: Path, num_photos: int, phone: bool) -> Prepared:
    """Photographs of 976 x 1280 pixels (of a `phone`: JPEGs of 3000 x 4000), their store, and its crops as files, tar,
    LitData and MDS. Needs Ray.
    """
    prepared = Prepared(folder)
    if not prepared.photos.exists():
        kind: dict[str, Any] = {"frame": (3000, 4000), "image_format": "jpg"} if phone else {}
        generate(prepared.photos, num_classes=20, num_singles=num_photos, num_combinations=0, **kind)
    build_manifest(prepared.photos, folder / "run", num_photos=None, num_classes=None, val_fraction=0.1)
    samples, store = prepared.crop_samples(), prepared.store()
    fill(store, samples, prepared.reader(), decoding_cpus=0.75)
    (folder / "crops").mkdir()
    boxes, rows = [], []
    for number, key in enumerate(RECIPE.keys(samples).tolist()):
        window = store.shards.get(key)
        assert window is not None
        box = window.decode(0).map_boxes(np.array(samples["box"][number].as_py()))
        data = bytes(window.data)
        (folder / "crops" / f"{number:06d}.jpg").write_bytes(data)
        boxes.append(box)
        rows.append((data, box))
    np.save(folder / "boxes.npy", np.array(boxes, np.float32))
    _write_yolo(folder / "yolo", prepared)
    rows *= STORE_REPEATS
    _write_tar(folder / "tar", rows)
    _write_litdata(folder / "litdata", rows)
    _write_mds(folder / "mds", rows)
    return prepared


def decode_crop(jpeg: bytes, box: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Decode and warp one crop, (224, 224, 3) uint8: used by all loaders that accept a function."""
    pixels = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR_RGB)
    assert pixels is not None
    return augment.crop(pixels, box, SIZE_PX, MARGIN, JITTER, rng)


def _write_tar(folder: Path, rows: list) -> None:
    folder.mkdir()
    for part in range(0, len(rows), 1000):
        with tarfile.open(folder / f"crops-{part // 1000:04d}.tar", "w") as tar:
            for number, (data, box) in enumerate(rows[part : part + 1000], start=part):
                for suffix, content in (("jpg", data), ("json", json.dumps([float(v) for v in box]).encode())):
                    info = tarfile.TarInfo(f"{number:06d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def _write_litdata(folder: Path, rows: list) -> None:
    try:
        from litdata.streaming.writer import BinaryWriter
    except ImportError:
        return
    folder.mkdir()
    writer = BinaryWriter(str(folder), chunk_bytes="64MB")
    for number, (data, box) in enumerate(rows):
        writer[number] = {"jpeg": data, "box": np.asarray(box, np.float32).tobytes()}
    writer.done()
    writer.merge(1)


def _write_mds(folder: Path, rows: list) -> None:
    try:
        from streaming import MDSWriter
    except ImportError:
        return
    with MDSWriter(out=str(folder), columns={"jpeg": "bytes", "box": "bytes"}) as writer:
        for data, box in rows:
            writer.write({"jpeg": data, "box": np.asarray(box, np.float32).tobytes()})


def _write_yolo(folder: Path, prepared: Prepared) -> None:
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True)
    samples = prepared.frame_samples()
    # ultralytics keeps the last 128 photos decoded: with fewer photos than that it would read each only once.
    samples = pa.concat_tables([samples] * -(-LEAST_PHOTOS // len(samples)))
    rows = zip(samples["location"].to_pylist(), samples["boxes"].to_pylist(), strict=True)
    for number, (path, boxes) in enumerate(rows):
        photo = (prepared.photos / path).resolve()
        header = read_header(photo.read_bytes())
        (folder / "images" / f"{number:06d}{photo.suffix}").symlink_to(photo)
        centred = np.array([(x + w / 2, y + h / 2, w, h) for x, y, w, h in boxes]) / ((header.width, header.height) * 2)
        lines = [f"0 {x} {y} {w} {h}\n" for x, y, w, h in centred.tolist()]
        (folder / "labels" / f"{number:06d}.txt").write_text("".join(lines))
