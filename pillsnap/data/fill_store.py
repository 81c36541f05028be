"""Fills the decode-once store of a task by Ray Data, one shard of consecutive samples per task; resumable."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pillsnap.data.sources import Cutter, SplitStore
from pillsnap.data.store.shard_files import shard_folder
from pillsnap.data.store.shards import DESCRIPTION_NAME, ShardStore
from pillsnap.data.stream import share_samples
from pillsnap.data.windows import JPEG_QUALITY, Codec
from pillsnap.errors import UserError
from pillsnap.observe.work_progress import Progress, unseen
from pillsnap.photos.decode import BadImage
from pillsnap.photos.reader import PhotoReader
from pillsnap.storage import is_uri, join

if TYPE_CHECKING:
    import ray

VERSION = 1
"""Increased when the same parameters give other pixels."""
SAMPLES_PER_SHARD = 256
KEPT_FREE_BYTES = 2 * 10**9
"""Disk space that a store leaves for checkpoints and logs."""
_WINDOWS_TRIED = 8


@dataclass(frozen=True)
class Filled:
    """Result of filling a store."""

    num_stored: int
    """Samples that are in the store."""
    num_new: int
    num_bytes: int
    """Size of the store on disk."""
    bad: list[tuple[str, str]]
    """(sample id, reason) of photos that cannot be read."""


@dataclass(frozen=True)
class Room:
    """Disk space for a store; `free_bytes` is None where it is not limited, in object storage."""

    needed_bytes: int
    free_bytes: int | None
    folder: str

    @property
    def is_enough(self) -> bool:
        return self.free_bytes is None or self.needed_bytes + KEPT_FREE_BYTES <= self.free_bytes

    def __str__(self) -> str:
        free = "" if self.free_bytes is None else f" of {self.free_bytes / 1e9:.1f} GB free"
        return f"about {self.needed_bytes / 1e9:.1f} GB{free} in {self.folder}"


def room_for(stores: Iterable[tuple[SplitStore, pa.Table]], folder: str, reader: PhotoReader) -> Room:
    """Space for the windows that stores in `folder` still lack, from the sizes of a few windows of each.

    A photo that cannot be read counts as stored.
    """
    needed_bytes = 0
    for store, samples in stores:
        numbers = np.unique(np.linspace(0, len(samples) - 1, _WINDOWS_TRIED).astype(int)) if len(samples) else ()
        source = store.source(reader)
        for number in numbers:
            source.fetch(samples, int(number))
        if source.fresh:
            needed_bytes += len(samples) * sum(len(window.data) for _, window in source.fresh) // len(numbers)
    if is_uri(folder):
        return Room(needed_bytes, None, folder)
    existing = next(path for path in (Path(folder).absolute(), *Path(folder).absolute().parents) if path.exists())
    return Room(needed_bytes, shutil.disk_usage(existing).free, folder)


def store_folder(store_dir: str | None, run: str | Path) -> str:
    """Folder or URI of the stores of a run, which is itself a folder or URI; `store_dir` overrides it."""
    return store_dir.rstrip("/") if store_dir else join(str(run), "store")


def remove_stores(folder: str) -> None:
    """Delete every store in a folder of stores."""
    ShardStore(folder).remove()


def split_stores(
    folder: str, task: str, cutter: Cutter, codec: Codec, manifest_hash: str, *, read_only: bool = False
) -> dict[str, SplitStore]:
    """The stores of a task's two splits in `folder`, perhaps empty or partly filled; writes their descriptions, unless
    `read_only`.

    The name of a store has a hash of everything that determines its content, such as manifest, crop size and margin.
    """
    stores = {}
    for split in ("train", "val"):
        parts = {"version": VERSION, "cutter": repr(cutter), "codec": codec, "quality": JPEG_QUALITY}
        transform = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]
        path = join(folder, f"{manifest_hash[:12]}-{task}-{split}-{transform}")
        about = {"task": task, "split": split, "manifest_hash": manifest_hash} | parts
        if not read_only:
            shard_folder(path).write(DESCRIPTION_NAME, json.dumps(about, indent=2).encode())
        stores[split] = SplitStore(ShardStore(path), cutter, codec, split == "train", read_only)
    return stores


def fill(
    store: SplitStore, samples: pa.Table, reader: PhotoReader, decoding_cpus: float, progress: Progress = unseen
) -> Filled:
    """Make the windows that are missing in a store. Ray must be initialised. Raises UserError when writing fails."""
    import ray

    keys = store.cutter.keys(samples)
    missing = np.flatnonzero(~store.shards.stored(keys))
    total, done = len(samples), len(samples) - len(missing)
    bad: list[tuple[str, str]] = []
    if len(missing):
        starts = range(0, len(missing), SAMPLES_PER_SHARD)
        blocks = [pa.table({"sample": missing[start : start + SAMPLES_PER_SHARD]}) for start in starts]
        made = ray.data.from_arrow(blocks).map_batches(
            _fill_shard,
            fn_kwargs={"store": store, "samples": share_samples(samples), "reader": reader},
            batch_size=None,
            num_cpus=decoding_cpus,
        )
        try:
            for batch in made.iter_batches(batch_size=None):
                for num_stored, failures in zip(batch["num_stored"].tolist(), batch["bad"], strict=True):
                    bad += [(sample_id, reason) for sample_id, reason in json.loads(str(failures))]
                    done += num_stored
                    progress(done + len(bad), total)
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, UserError) else error) from None
    num_stored = int(store.shards.stored(keys).sum())
    return Filled(num_stored, num_stored - (total - len(missing)), sum(store.shards.shards().values()), bad)


def _fill_shard(
    block: dict[str, np.ndarray], *, store: SplitStore, samples: ray.ObjectRef, reader: PhotoReader
) -> dict[str, Any]:
    import cv2
    import ray

    cv2.setNumThreads(1)
    table = ray.get(samples)
    bad = []
    source = store.source(reader)
    for number in block["sample"].tolist():
        window = source.fetch(table, number)
        if isinstance(window, BadImage):
            bad.append((table["sample_id"][number].as_py(), str(window)))
    num_stored = len(source.fresh)
    source.flush()
    return {"num_stored": np.array([num_stored]), "bad": np.array([json.dumps(bad, ensure_ascii=False)])}
