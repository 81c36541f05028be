"""Decode workers: processes of a train worker that decode and augment its batches into memory shared with it.

Pixels are written once, to pages that are reused: new pages would cost up to a tenth of the decoding time. Processes,
because threads would share the interpreter lock with the training loop.

    train worker                                     decode worker
    _Task(slot number, shipped windows, offset)  ->  writes the images at that offset of the shared memory
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
"""Batches submitted to each process: one in progress, the others queued."""
_END_S = 5.0
"""Grace period for idle workers to exit."""


@dataclass(frozen=True)
class _Task:
    number: int
    shipped: Shipped
    offset: int
    """Of the images in the shared memory, in bytes."""


class DecodeWorkers:
    """`count` processes that make batches of a stream; results come in the order of submission."""

    def __init__(self, maker: BatchMaker, count: int) -> None:
        size_px = maker.recipe.size_px
        self._memory = _SharedImages((maker.plan.worker_batch_size, size_px, size_px, 3))
        tables = [_table_file(maker.samples[training]) for training in (True, False)]
        setup = (replace(maker, samples={}, keys={}), self._memory.shape)  # the processes map the samples
        self._processes = [_Process((self._memory.file.fileno(), *tables), setup) for _ in range(count)]
        for table in tables:
            os.close(table)
        self._submitted: deque[tuple[_Process, int]] = deque()

    def __len__(self) -> int:
        """Batches that were submitted and not taken."""
        return len(self._submitted)

    def submit(self, number: int, shipped: Shipped) -> None:
        """Start making the batch of a slot."""
        process = min(self._processes, key=_Process.num_to_make)
        # Of equally busy processes, min() takes the first: the least recently used one.
        self._processes.remove(process)
        self._processes.append(process)
        offset = self._memory.take()
        process.submit(_Task(number, shipped, offset))
        self._submitted.append((process, offset))

    def take(self) -> Batch:
        """Wait for the next batch. The memory of its images is reused once nothing refers to them.

        Raises the error of its recipe, or RuntimeError when the process died.
        """
        process, offset = self._submitted.popleft()
        batch = process.answer()
        return batch | {"image": self._memory.images(offset)}

    def close(self) -> None:
        """End the processes. Batches that were taken stay valid."""
        for process in self._processes:
            process.close()
        self._memory.file.close()


def decode_ahead(rows: Iterable[Row], maker: BatchMaker, num_processes: int) -> Iterator[Batch]:
    """Batches of packed rows, in order, made ahead of the consumer by `num_processes` processes, started at once."""
    return _decode(rows, maker.plan, DecodeWorkers(maker, num_processes), _AHEAD * num_processes)


def _decode(rows: Iterable[Row], plan: StreamPlan, processes: DecodeWorkers, num_ahead: int) -> Iterator[Batch]:
    try:
        for row in rows:
            windows = unpack(row)
            for number in row["slots"][0].tolist():
                members = plan.slot(number).members.tolist()
                processes.submit(number, {member: next(windows) for member in members})
                if len(processes) > num_ahead:
                    yield processes.take()
        while len(processes):
            yield processes.take()
    finally:
        processes.close()


class _SharedImages:
    """Shared memory for batches of images, reused when a batch is gone. It has no name in the file system, so that none
    is left behind.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self._bytes = -(-int(np.prod(shape)) // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        self.file = os.fdopen(os.memfd_create("pillsnap-batches"), "r+b", buffering=0)
        self._maps: dict[int, mmap.mmap] = {}
        self._free: deque[int] = deque()

    def take(self) -> int:
        """The offset of memory for one batch, in bytes."""
        if self._free:
            return self._free.popleft()
        offset = len(self._maps) * self._bytes
        self.file.truncate(offset + self._bytes)
        self._maps[offset] = mmap.mmap(self.file.fileno(), self._bytes, offset=offset)
        return offset

    def images(self, offset: int) -> np.ndarray:
        """The images at an offset, which becomes free when nothing refers to them."""
        images = _as_images(self._maps[offset], self.shape)
        assert isinstance(images.base, np.ndarray)
        weakref.finalize(images.base, self._free.append, offset).atexit = False
        return images


def _as_images(memory: mmap.mmap, shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(memory, np.uint8, int(np.prod(shape))).reshape(shape)


class _Process:
    def __init__(self, files: tuple[int, ...], setup: object) -> None:
        ours, theirs = socket.socketpair()
        files = (theirs.fileno(), *files)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "pillsnap.data.decode_workers", *map(str, files)],
            pass_fds=files,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        theirs.close()
        self._connection = Connection(ours.detach())
        self._num_pending = 0
        self._answers: deque[Batch | BaseException] = deque()
        self._send(setup)

    def num_to_make(self) -> int:
        """Batches that were submitted and are not made yet."""
        while self._connection.poll():
            self._receive()
        return self._num_pending

    def submit(self, task: _Task) -> None:
        self._send(task)
        self._num_pending += 1

    def answer(self) -> Batch:
        """Wait for the oldest batch that was not taken."""
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
        self._num_pending -= 1

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
            f"A decode worker died ({how}). If the kernel killed it for lack of memory, use fewer of them "
            "(data.decoding_processes)."
        )


def _table_file(table: pa.Table) -> int:
    """File descriptor of shared memory with the table, which all processes map."""
    descriptor = os.memfd_create("pillsnap-samples")
    with os.fdopen(os.dup(descriptor), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    return descriptor


def main() -> None:
    """Entry point of a decode worker. argv: descriptors of its connection, the shared images and the sample tables."""
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
            if task.offset not in maps:
                length = int(np.prod(shape))
                maps[task.offset] = _as_images(mmap.mmap(memory, length, offset=task.offset), shape)
            worker.send(_answer(maker, task, maps[task.offset]))
    except (EOFError, OSError):
        pass  # the train worker has exited
    os._exit(0)  # the receiving thread is blocked in a read


def _receive(worker: Connection, tasks: queue.SimpleQueue[_Task | None]) -> None:
    # In a thread: if both sides only sent, each would wait for the other to receive.
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
    except Exception as error:  # raised again in the train worker
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            return RuntimeError(f"{type(error).__name__}: {error}")
        return error


def _read_table(descriptor: int) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(f"/proc/self/fd/{descriptor}")).read_all()


if __name__ == "__main__":
    main()
