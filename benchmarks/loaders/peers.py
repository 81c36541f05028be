"""Other loaders, each with data in its own format and tuned as documented: endless (epoch, batch)."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.loaders.data import (
    BATCH,
    CORES,
    FRAME_BATCH,
    FRAME_PX,
    JITTER,
    MARGIN,
    SIZE_PX,
    STORE_REPEATS,
    Prepared,
    decode_crop,
)
from benchmarks.loaders.measure import Batches
from pillsnap.data import augment

WORKERS = CORES


class _Photos(Dataset):
    """Crops from the photos, by cv2."""

    def __init__(self, data: Prepared) -> None:
        samples = data.crop_samples()
        repeats = data.photo_repeats()
        self.paths = [str(data.photos / path) for path in samples["location"].to_pylist()] * repeats
        self.boxes = np.tile(np.array(samples["box"].to_pylist(), np.float32), (repeats, 1))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> np.ndarray:
        photo = cv2.imread(self.paths[number], cv2.IMREAD_COLOR_RGB)
        assert photo is not None
        return augment.crop(photo, self.boxes[number], SIZE_PX, MARGIN, JITTER, np.random.default_rng())


class _Crops(Dataset):
    """Crops from JPEG files, by cv2."""

    def __init__(self, data: Prepared) -> None:
        self.paths, self.boxes = [str(path) for path in data.jpegs()], data.boxes()

    def __len__(self) -> int:
        return len(self.paths) * STORE_REPEATS

    def __getitem__(self, number: int) -> np.ndarray:
        number %= len(self.paths)
        return decode_crop(Path(self.paths[number]).read_bytes(), self.boxes[number], np.random.default_rng())


def torch_photos(data: Prepared) -> Batches:
    return _torch(_Photos(data))


def torch_crops(data: Prepared) -> Batches:
    return _torch(_Crops(data))


def _torch(dataset: Dataset) -> Batches:
    loader = DataLoader(
        dataset, BATCH, shuffle=True, num_workers=WORKERS, prefetch_factor=4, persistent_workers=True,
        collate_fn=_stack, worker_init_fn=_one_thread,
    )  # fmt: skip
    return _epochs(lambda: loader)


def timm_photos(data: Prepared) -> Batches:
    """timm's own loader: its dataset, transforms, collation and prefetcher, on pills cropped by Pillow."""
    from PIL import Image
    from timm.data.loader import create_loader

    class Pills(Dataset):
        def __init__(self) -> None:
            self.photos = _Photos(data)
            self.transform: Any = None  # set by timm

        def __len__(self) -> int:
            return len(self.photos)

        def __getitem__(self, number: int) -> tuple[Any, int]:
            x, y, width, height = self.photos.boxes[number].tolist()
            side = max(width, height) * (1 + 2 * MARGIN)
            left, top = x + (width - side) / 2, y + (height - side) / 2
            pill = Image.open(self.photos.paths[number]).convert("RGB").crop((left, top, left + side, top + side))
            return self.transform(pill), 0

    loader = create_loader(
        Pills(), (3, SIZE_PX, SIZE_PX), BATCH, is_training=True, hflip=0.0, color_jitter=0.0, scale=(0.8, 1.0),
        num_workers=WORKERS, device=torch.device("cpu"), persistent_workers=True,
    )  # fmt: skip
    return ((epoch, images) for epoch in itertools.count() for images, _ in loader)


def ultralytics_photos(data: Prepared) -> Batches:
    """ultralytics' own loader with its training augmentation."""
    from pillsnap.models.detector import quiet_ultralytics

    quiet_ultralytics()
    from ultralytics.cfg import get_cfg
    from ultralytics.data import build
    from ultralytics.utils import DEFAULT_CFG

    settings = get_cfg(DEFAULT_CFG, {"imgsz": FRAME_PX, "task": "detect", "workers": WORKERS})
    folder = data.folder / "yolo"
    dataset = build.build_yolo_dataset(
        settings, str(folder / "images"), FRAME_BATCH, {"names": {0: "pill"}, "channels": 3}, mode="train"
    )
    loader = build.build_dataloader(dataset, FRAME_BATCH, WORKERS, pin_memory=False, device="cpu")
    return ((epoch, batch["img"]) for epoch in itertools.count() for batch in loader)


def webdataset(data: Prepared) -> Batches:
    import webdataset as wds

    parts = sorted(str(path) for path in (data.folder / "tar").glob("*.tar"))

    def one_epoch() -> Any:
        dataset = wds.WebDataset(parts, shardshuffle=len(parts), workersplitter=wds.split_by_worker)
        decoded = (
            dataset.shuffle(1000)
            .decode(wds.handle_extension("json", _json))
            .map(lambda row: decode_crop(row["jpg"], np.array(row["json"]), np.random.default_rng()))
        )
        return decoded.batched(BATCH, collation_fn=_stack)

    loader = wds.WebLoader(
        one_epoch(), batch_size=None, num_workers=WORKERS, persistent_workers=True, worker_init_fn=_one_thread
    )
    return _epochs(lambda: loader)


def litdata(data: Prepared) -> Batches:
    from litdata import StreamingDataLoader, StreamingDataset

    class Crops(StreamingDataset):
        def __getitem__(self, index: Any) -> np.ndarray:
            row = super().__getitem__(index)
            return decode_crop(row["jpeg"], np.frombuffer(row["box"], np.float32), np.random.default_rng())

    loader = StreamingDataLoader(
        Crops(str(data.folder / "litdata"), shuffle=True), batch_size=BATCH, num_workers=WORKERS, collate_fn=_stack,
        persistent_workers=True, worker_init_fn=_one_thread,
    )  # fmt: skip
    return _epochs(lambda: loader)


def mosaicml(data: Prepared) -> Batches:
    from streaming import StreamingDataset

    class Crops(StreamingDataset):
        def __getitem__(self, index: Any) -> np.ndarray:
            row = super().__getitem__(index)
            return decode_crop(row["jpeg"], np.frombuffer(row["box"], np.float32), np.random.default_rng())

    dataset = Crops(local=str(data.folder / "mds"), shuffle=True, batch_size=BATCH)
    loader: DataLoader[Any] = DataLoader(
        dataset, BATCH, num_workers=WORKERS, prefetch_factor=4, persistent_workers=True, collate_fn=_stack,
        worker_init_fn=_one_thread,
    )  # fmt: skip
    return _epochs(lambda: loader)


def spdl(data: Prepared) -> Batches:
    """SPDL's pipeline of threads, with the common functions for decoding and warping."""
    from spdl.pipeline import PipelineBuilder

    cv2.setNumThreads(1)
    crops = _Crops(data)

    def one_epoch() -> Any:
        numbers = np.random.default_rng().permutation(len(crops)).tolist()
        pipeline = (
            PipelineBuilder()
            .add_source(numbers)
            .pipe(crops.__getitem__, concurrency=WORKERS)
            .aggregate(BATCH)
            .pipe(np.stack)
            .add_sink(4)
            .build(num_threads=WORKERS)
        )
        with pipeline.auto_stop():
            yield from pipeline

    return ((epoch, batch) for epoch in itertools.count() for batch in one_epoch())


def dali(data: Prepared) -> Batches:
    """DALI's CPU pipeline: its readers, decoder and warp."""
    from nvidia.dali import fn, pipeline_def, types

    files = [str(path) for path in data.jpegs()] * STORE_REPEATS

    @pipeline_def(batch_size=BATCH, num_threads=WORKERS, device_id=None, prefetch_queue_depth=2)
    def pipeline() -> Any:
        encoded, _ = fn.readers.file(files=files, random_shuffle=True, initial_fill=1000)
        images = fn.decoders.image(encoded, device="cpu", output_type=types.RGB)
        side = SIZE_PX * fn.random.uniform(range=[float(np.exp(-JITTER.scale)), float(np.exp(JITTER.scale))])
        angle = fn.random.uniform(range=[-JITTER.rotation_deg, JITTER.rotation_deg])
        shift = fn.random.uniform(range=[-JITTER.center * SIZE_PX, JITTER.center * SIZE_PX], shape=[2])
        matrix = fn.transforms.translation(offset=[-SIZE_PX / 2, -SIZE_PX / 2])
        matrix = fn.transforms.scale(matrix, scale=fn.stack(side, side) / SIZE_PX)
        matrix = fn.transforms.rotation(matrix, angle=angle)
        height_width = images.shape(dtype=types.FLOAT)  # the pill is in the middle of a stored crop
        matrix = fn.transforms.translation(matrix, offset=shift + fn.stack(height_width[1], height_width[0]) / 2)
        return fn.warp_affine(images, matrix=matrix, size=(SIZE_PX, SIZE_PX), interp_type=types.INTERP_LINEAR)

    pipe = pipeline()
    pipe.build()
    per_epoch = -(-len(files) // BATCH)
    for step in itertools.count():
        (images,) = pipe.run()
        yield step // per_epoch, images.as_array()


def _epochs(loader: Callable[[], Any]) -> Batches:
    return ((epoch, batch) for epoch in itertools.count() for batch in loader())


def _stack(images: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(images))


def _one_thread(_: int) -> None:
    cv2.setNumThreads(1)


def _json(data: bytes) -> Any:
    import json

    return json.loads(data)
