"""Reads many label files in parallel: in Ray Data tasks, in local processes, or in this process when they are few.

Labels are returned in the order of the jobs in every case, so the manifest is the same.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pillsnap.manifest.attributes import Texts
from pillsnap.manifest.labels import Label, read_labels
from pillsnap.observe.work_progress import Progress, unseen
from pillsnap.ray_compat.minimal_cluster import local_cluster
from pillsnap.ray_compat.row_blocks import in_order

if TYPE_CHECKING:
    import pyarrow as pa

LabelReader = Literal["auto", "ray", "processes"]
LabelJob = tuple[str, str]
"""(location under the data root or "", expected K-code), see labels.read_labels."""
_CHUNK = 500
PARALLEL_FROM = 20_000
"""Number of label files from which workers are faster: one process reads this many in about 1.5 s."""
_RAY_CHUNK = 2000
_OBJECT_STORE_BYTES = 100 * 1024**2


def read_all_labels(
    data_root: Path,
    jobs: list[LabelJob],
    num_workers: int | None = None,
    progress: Progress = unseen,
    reader: LabelReader = "auto",
) -> list[Label]:
    """Labels of `jobs`, in order. Bad files do not raise.

    `num_workers`: concurrent processes or Ray tasks (None: all cores). Ray Data uses the cluster that this process is
    connected to or that RAY_ADDRESS names, whose nodes must see the data root under the same path, else a local one.
    `auto` uses Ray Data only where there is such a cluster: starting Ray takes longer than local processes need for the
    labels of stage 3.
    """
    root = os.fspath(data_root)
    labels: list[Label] = []
    for part in _parts(root, jobs, num_workers or os.cpu_count() or 1, reader):
        labels += part
        progress("labels", len(labels), len(jobs))
    return labels


def _parts(root: str, jobs: list[LabelJob], num_workers: int, reader: LabelReader) -> Iterator[list[Label]]:
    if not jobs:
        return iter(())
    if reader == "auto" and (num_workers == 1 or len(jobs) < PARALLEL_FROM):
        return (read_labels(root, chunk) for chunk in _chunks(jobs, _CHUNK))
    if reader == "processes" or (reader == "auto" and not _has_cluster()):
        return _with_processes(root, jobs, num_workers)
    return _with_ray_data(root, jobs, num_workers)


def _has_cluster() -> bool:
    if os.environ.get("RAY_ADDRESS"):
        return True
    ray = sys.modules.get("ray")  # a connected process has imported it
    return ray is not None and ray.is_initialized()


def _chunks(jobs: list[LabelJob], size: int) -> list[list[LabelJob]]:
    return [jobs[start : start + size] for start in range(0, len(jobs), size)]


def _with_processes(root: str, jobs: list[LabelJob], num_workers: int) -> Iterator[list[Label]]:
    chunks = _chunks(jobs, _CHUNK)
    # A fork would copy Arrow's threads in an unknown state; children of the fork server import only labels.py.
    with ProcessPoolExecutor(num_workers, mp_context=get_context("forkserver")) as pool:
        yield from pool.map(read_labels, [root] * len(chunks), chunks)


def _with_ray_data(root: str, jobs: list[LabelJob], num_workers: int) -> Iterator[list[Label]]:
    import pyarrow as pa

    blocks = [
        pa.table({"location": [job[0] for job in chunk], "code": [job[1] for job in chunk]})
        for chunk in _chunks(jobs, _RAY_CHUNK)
    ]
    with _ray(num_workers), in_order():
        import ray

        labels = ray.data.from_arrow(blocks).map_batches(
            _read_block,
            fn_args=(root,),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=1,
            concurrency=num_workers,
        )
        for block in labels.iter_batches(batch_size=None, batch_format="pyarrow"):
            yield _from_table(block)


def _read_block(block: pa.Table, root: str) -> pa.Table:
    import pyarrow as pa

    jobs = list(zip(block["location"].to_pylist(), block["code"].to_pylist(), strict=True))
    columns: dict[str, Any] = dict(zip(Label._fields, zip(*read_labels(root, jobs), strict=True), strict=True))
    types = {"box": pa.list_(pa.float64()), "edi_codes": pa.list_(pa.string()), "width": pa.int64(),
             "height": pa.int64(), "direction": pa.int64(),
             "attributes": pa.list_(pa.list_(pa.string()))}  # fmt: skip
    return pa.table({name: pa.array(columns[name], types.get(name, pa.string())) for name in Label._fields})


def _from_table(block: pa.Table) -> list[Label]:
    rows = zip(*(block[name].to_pylist() for name in Label._fields), strict=True)
    known: dict[Texts, Texts] = {}
    return [
        Label(problem, None if box is None else tuple(box), width, height, name, tuple(edi_codes), file_name, direction,
              known.setdefault(texts, texts))
        for problem, box, width, height, name, edi_codes, file_name, direction, pairs in rows
        for texts in [tuple(map(tuple, pairs))]
    ]  # fmt: skip


@contextmanager
def _ray(num_workers: int) -> Iterator[None]:
    """The initialised Ray, else the cluster of RAY_ADDRESS, else a local one for the duration of the block.

    The local one has no dashboard and a small object store, so that a build stays within 2 GB of memory.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    with ExitStack() as stack:
        if os.environ.get("RAY_ADDRESS"):
            ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
        else:
            options = {"num_cpus": num_workers, "object_store_memory": _OBJECT_STORE_BYTES}
            stack.enter_context(local_cluster(logging_level=logging.ERROR, **options))
        stack.callback(ray.shutdown)
        import ray.data

        logging.getLogger("ray.data").setLevel(logging.ERROR)
        yield
