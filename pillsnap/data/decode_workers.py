"""Processes of a train worker that decode and augment its batches, into memory that they share with it.

A batch is made in the pages in which the worker reads it: its pixels are written once, and pages are used again, since
fresh ones of the kernel cost as much as a tenth of decoding. Each process has an interpreter of its own: threads of the
worker would wait for one another's, and for the training loop's.

    worker                                         decoding process
    Task(slot number, what was shipped, where) ->  the slot's batch, its images at that place
                                               <-  the batch's other arrays, or the error
"""

from __future__ import annotations

import mmap
import os
import pickle
import queue
import socket
import subprocess
import sys
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import NoReturn

import numpy as np
import pyarrow as pa

from pillsnap.data.batch_maker import BatchMaker
from pillsnap.data.malloc import keep_freed_memory
from pillsnap.data.packing import unpack
from pillsnap.data.plan import StreamPlan
from pillsnap.data.recipes import Batch, Row
from pillsnap.data.sources import Shipped, ShippedSource

_AHEAD = 3
"""Batches asked of each process at a time: one is being made, the others wait."""
_END_S = 5.0
"""Within which a process ends that has nobody to work for."""


@dataclass(frozen=True)
class _Task:
    number: int
    shipped: Shipped
    place: int
    """Where in the shared memory the images go, in bytes."""


class DecodingProcesses:
    """`count` processes that make batches of a stream. Batches are taken in the order in which they were asked for."""

    def __init__(self, maker: BatchMaker, count: int) -> None:
        size_px = maker.recipe.size_px
        self._memory = _SharedImages((maker.plan.worker_batch_size, size_px, size_px, 3))
        tables = [_table_file(maker.samples[training]) for training in (True, False)]
        known = (replace(maker, samples={}, keys={}), self._memory.shape)  # the processes map the samples
        self._processes = [_Process((self._memory.file.fileno(), *tables), known) for _ in range(count)]
        for table in tables:
            os.close(table)
        self._asked: deque[tuple[_Process, int]] = deque()

    def __len__(self) -> int:
        """Batches that were asked for and not taken."""
        return len(self._asked)

    def ask(self, number: int, shipped: Shipped) -> None:
        """Let the batch of a slot be made."""
        process = min(self._processes, key=_Process.num_to_make)
        # Of several that have as much to do, the one whose turn is longest ago.
        self._processes.remove(process)
        self._processes.append(process)
        place = self._memory.take()
        process.ask(_Task(number, shipped, place))
        self._asked.append((process, place))

    def take(self) -> Batch:
        """The next batch, when it is made. Its images may be written over when nothing refers to them any more.

        Raises what its recipe raised, and RuntimeError when the process died.
        """
        process, place = self._asked.popleft()
        batch = process.answer()
        return batch | {"image": self._memory.images(place)}

    def close(self) -> None:
        """End the processes. Batches that were taken stay."""
        for process in self._processes:
            process.close()
        self._memory.file.close()


def decode_ahead(rows: Iterable[Row], maker: BatchMaker, num_processes: int) -> Iterator[Batch]:
    """Batches in the order of the packed rows, made by `num_processes` processes ahead of the consumer, which
    start at once.
    """
    return _decode(rows, maker.plan, DecodingProcesses(maker, num_processes), _AHEAD * num_processes)


def _decode(rows: Iterable[Row], plan: StreamPlan, processes: DecodingProcesses, num_ahead: int) -> Iterator[Batch]:
    try:
        for row in rows:
            windows = unpack(row)
            for number in row["slots"][0].tolist():
                members = plan.slot(number).members.tolist()
                processes.ask(number, {member: next(windows) for member in members})
                if len(processes) > num_ahead:
                    yield processes.take()
        while len(processes):
            yield processes.take()
    finally:
        processes.close()


class _SharedImages:
    """Memory for batches of images, of which each place is used again when its batch is gone. It has no name in the
    file system, and so cannot be left behind.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self._bytes = -(-int(np.prod(shape)) // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        self.file = os.fdopen(os.memfd_create("pillsnap-batches"), "r+b", buffering=0)
        self._maps: dict[int, mmap.mmap] = {}
        self._free: deque[int] = deque()

    def take(self) -> int:
        """A free place, in bytes from the beginning."""
        if self._free:
            return self._free.popleft()
        place = len(self._maps) * self._bytes
        self.file.truncate(place + self._bytes)
        self._maps[place] = mmap.mmap(self.file.fileno(), self._bytes, offset=place)
        return place

    def images(self, place: int) -> np.ndarray:
        """The images at a place, which is free again when nothing refers to them any more."""
        images = _as_images(self._maps[place], self.shape)
        assert isinstance(images.base, np.ndarray)
        weakref.finalize(images.base, self._free.append, place).atexit = False
        return images


def _as_images(memory: mmap.mmap, shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(memory, np.uint8, int(np.prod(shape))).reshape(shape)


class _Process:
    def __init__(self, files: tuple[int, ...], known: object) -> None:
        ours, theirs = socket.socketpair()
        files = (theirs.fileno(), *files)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pillsnap.data.decode_workers", *map(str, files)],
            pass_fds=files,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        theirs.close()
        self._connection = Connection(ours.detach())
        self._num_asked = 0
        self._answers: deque[Batch | BaseException] = deque()
        self._send(known)

    def num_to_make(self) -> int:
        """Batches that it was asked for and has not made."""
        while self._connection.poll():
            self._receive()
        return self._num_asked

    def ask(self, task: _Task) -> None:
        self._send(task)
        self._num_asked += 1

    def answer(self) -> Batch:
        """The first batch that was not taken yet, when it is made."""
        if not self._answers:
            self._receive()
        answer = self._answers.popleft()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _receive(self) -> None:
        try:
            self._answers.append(self._connection.recv())
        except (EOFError, OSError):
            self._raise_death()
        self._num_asked -= 1

    def close(self) -> None:
        self._connection.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _send(self, message: object) -> None:
        try:
            self._connection.send(message)
        except OSError:
            self._raise_death()

    def _raise_death(self) -> NoReturn:
        self.close()
        code = self._process.returncode
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise RuntimeError(
            f"A process that decodes ended ({how}); if the kernel ended it for want of memory, let fewer of them run "
            "(data.decoding_processes)."
        )


def _table_file(table: pa.Table) -> int:
    """A descriptor of memory that holds the table, for processes that map it and so hold it once together."""
    descriptor = os.memfd_create("pillsnap-samples")
    with os.fdopen(os.dup(descriptor), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    return descriptor


def main() -> None:
    """A decoding process: its connection, the images' memory and the tables of samples are descriptors in argv."""
    import cv2

    cv2.setNumThreads(1)
    keep_freed_memory()
    connection, memory, train, val = (int(text) for text in sys.argv[1:5])
    worker = Connection(connection)
    tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
    try:
        maker, shape = worker.recv()
        maker = replace(maker, samples={True: _read_table(train), False: _read_table(val)})
        threading.Thread(target=_receive, args=(worker, tasks), daemon=True).start()
        maps: dict[int, np.ndarray] = {}
        while (task := tasks.get()) is not None:
            if task.place not in maps:
                length = int(np.prod(shape))
                maps[task.place] = _as_images(mmap.mmap(memory, length, offset=task.place), shape)
            worker.send(_answer(maker, task, maps[task.place]))
    except (EOFError, OSError):
        pass  # the worker is gone
    os._exit(0)  # the thread waits in a read that nobody ends


def _receive(worker: Connection, tasks: queue.SimpleQueue[_Task | None]) -> None:
    # A worker that hands over windows must never wait for a process that is itself waiting to hand over a batch.
    try:
        while True:
            tasks.put(worker.recv())
    except (EOFError, OSError):
        tasks.put(None)


def _answer(maker: BatchMaker, task: _Task, images: np.ndarray) -> Batch | BaseException:
    try:
        slot = maker.plan.slot(task.number)
        source = ShippedSource(maker.reader, shipped=task.shipped, store=maker.source(slot.training))
        batch = maker.make(slot, source, images)
        return {name: value for name, value in batch.items() if name != "image"}
    except Exception as error:  # raised again in the worker, whatever it is
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            return RuntimeError(f"{type(error).__name__}: {error}")
        return error


def _read_table(descriptor: int) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(f"/proc/self/fd/{descriptor}")).read_all()


if __name__ == "__main__":
    main()
