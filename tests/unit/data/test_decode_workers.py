"""Decode workers: same batches in order, reused memory, and their end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest

from pillsnap.data.augment import CropJitter
from pillsnap.data.batch_maker import BatchMaker
from pillsnap.data.decode_workers import DecodeWorkers
from pillsnap.data.plan import StreamPlan
from pillsnap.data.recipes import CropRecipe
from pillsnap.data.samples import classification_samples
from pillsnap.data.windows import EncodedWindow
from pillsnap.errors import UserError
from pillsnap.manifest.table import read_manifest
from pillsnap.photos.reader import PhotoReader
from tests.processes import command_line, is_running

RECIPE = CropRecipe(48, 0.1, CropJitter(0.06, 0.12, 180))
BATCH = 8


@pytest.fixture
def maker(toy_manifest: Path, toy_tree: Path) -> BatchMaker:
    """Makes the crops of a small manifest."""
    manifest = read_manifest(toy_manifest)
    samples = classification_samples(
        manifest, sorted({code for codes in manifest["codes"].to_pylist() for code in codes})
    )
    tables = {True: samples.train, False: samples.val}
    plan = StreamPlan(3, 2, len(samples.train), len(samples.val), BATCH, 1)
    reader = PhotoReader(str(toy_tree), 10**7)
    return BatchMaker(plan, RECIPE, reader, samples=tables, stores={True: None, False: None})


@pytest.fixture
def processes(maker: BatchMaker) -> Iterator[DecodeWorkers]:
    started = DecodeWorkers(maker, 2)
    yield started
    started.close()
    assert running_workers() == []


def running_workers(of: psutil.Process | None = None) -> list[psutil.Process]:
    return [
        each for each in (of or psutil.Process()).children() if "pillsnap.data.decode_workers" in command_line(each)
    ]


def shipped_photos(maker: BatchMaker, number: int) -> dict[int, Any]:
    slot = maker.plan.slot(number)
    paths = maker.samples[slot.training]["location"]
    return {
        member: EncodedWindow(maker.reader.read_bytes(paths[member].as_py()), own=False)
        for member in slot.members.tolist()
    }


def test_batches_equal_those_of_one_process_in_order(maker: BatchMaker, processes: DecodeWorkers) -> None:
    numbers = [*range(maker.plan.num_slots), 0, 0, 0]
    taken = []
    for number in numbers:
        # Some windows come along, the others are read there.
        shipped = {member: window if member % 2 else None for member, window in shipped_photos(maker, number).items()}
        processes.submit(number, shipped)
        if len(processes) > 4:
            taken.append(processes.take())
    taken += [processes.take() for _ in range(len(processes))]
    assert len(taken) == len(numbers)
    for number, batch in zip(numbers, taken, strict=True):
        slot = maker.plan.slot(number)
        expected = maker.make(slot, maker.source(slot.training))
        assert batch.keys() == expected.keys()
        for name in batch.keys() - {"stage_s"}:
            np.testing.assert_array_equal(batch[name], expected[name])


def test_memory_is_reused_after_a_batch_is_deleted(maker: BatchMaker, processes: DecodeWorkers) -> None:
    kept = []
    for number in range(3):
        processes.submit(number, shipped_photos(maker, number))
        batch = processes.take()
        kept.append((batch["image"][None][0], batch["image"].copy()))
    batch_bytes = os.fstat(processes._memory.file.fileno()).st_size // 3
    for _ in range(10):
        processes.submit(5, shipped_photos(maker, 5))
        processes.take()
    assert os.fstat(processes._memory.file.fileno()).st_size == 4 * batch_bytes
    for images, copied in kept:
        np.testing.assert_array_equal(images, copied)
    processes.close()
    np.testing.assert_array_equal(*kept[0])


def test_dead_decode_worker_is_an_error(maker: BatchMaker, processes: DecodeWorkers) -> None:
    processes.submit(0, shipped_photos(maker, 0))
    processes.take()
    running_workers()[0].kill()
    with pytest.raises(RuntimeError, match=r"signal 9.*data\.decoding_processes"):
        for _ in range(4):
            processes.submit(0, shipped_photos(maker, 0))
            processes.take()


class Refusing(CropRecipe):
    def make(self, samples: pa.Table, *_: Any, **__: Any) -> Any:
        raise UserError(f"The shard of {len(samples)} samples is damaged.")


def test_error_of_a_recipe_is_raised_in_the_train_worker(maker: BatchMaker) -> None:
    processes = DecodeWorkers(replace(maker, recipe=Refusing(48, 0.1, CropJitter())), 1)
    processes.submit(0, {})
    with pytest.raises(UserError, match="is damaged"):
        processes.take()
    processes.close()


ABANDONED = """
import time
import pyarrow as pa
from pillsnap.data.augment import CropJitter
from pillsnap.data.batch_maker import BatchMaker
from pillsnap.data.recipes import CropRecipe
from pillsnap.data.decode_workers import DecodeWorkers
from pillsnap.data.plan import StreamPlan
from pillsnap.photos.reader import PhotoReader
table = pa.table({"sample_id": ["a"], "location": ["a.png"], "label": [0], "box": [[0.0, 0.0, 1.0, 1.0]]})
maker = BatchMaker(
    StreamPlan(0, 1, 1, 1, 1, 1), CropRecipe(48, 0.1, CropJitter()), PhotoReader("/nowhere", 100),
    samples={True: table, False: table}, stores={True: None, False: None},
)
processes = DecodeWorkers(maker, 2)
processes.submit(0, {0: None})
assert "missing" in str(processes.take()["quarantine"])
print("ready", flush=True)
time.sleep(600)
"""


def test_decode_workers_exit_when_the_train_worker_is_killed() -> None:
    worker = subprocess.Popen([sys.executable, "-c", ABANDONED], stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None and worker.stdout.readline() == "ready\n"
    orphans = running_workers(psutil.Process(worker.pid))
    assert len(orphans) == 2
    worker.send_signal(signal.SIGKILL)
    worker.wait(10)
    worker.stdout.close()
    end_s = time.monotonic() + 30
    while any(is_running(orphan.pid) for orphan in orphans):
        assert time.monotonic() < end_s, "a process is left behind"
        time.sleep(0.05)
