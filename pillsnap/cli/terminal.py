"""Output of the commands: lines, progress bars, the exit code of an interruption, and output that nobody reads."""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from rich.console import Console

from pillsnap.errors import UserError

STOPPED = 130
console = Console()


def say(line: str, style: str | None = None) -> None:
    """Print one line as it is, without markup, emoji codes, line breaks or colours other than `style`."""
    console.out(line, style=style, highlight=False)


def progress_bar(what: str) -> AbstractContextManager[Callable[..., None]]:
    """Progress on standard output, updated by calls of (done, total) or (phase, done, total)."""
    from pillsnap.observe import work_progress

    return work_progress.progress_bar(what, console)


class _Dispensable(io.RawIOBase):
    """Bytes for a stream; when they cannot be written, `lost` says why and work continues."""

    def __init__(self, stream: Any) -> None:
        self._stream = getattr(stream, "raw", stream)  # no buffer that the interpreter would flush at its end
        self.lost: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return int(self._stream.fileno())

    def isatty(self) -> bool:
        return bool(self._stream.isatty())

    def write(self, data: Any, /) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while rest:
                written = self._stream.write(rest)
                if written is None:  # a terminal in non-blocking mode is busy
                    select.select([], [self], [])
                rest = rest[written or 0 :]
        except OSError as error:
            self.lost = error
        return size


@contextmanager
def dispensable_output() -> Iterator[None]:
    """Make standard output and error lose what cannot be written (a terminal that is gone, a full disk, a closed pipe)
    and escape what cannot be encoded, so that printing never ends a command.
    """
    descriptor = 0
    while descriptor <= 2:  # a file opened later in the place of a closed one would get the output
        descriptor = os.open(os.devnull, os.O_RDWR)
    os.close(descriptor)
    before = sys.stdout, sys.stderr
    streams = []
    for stream in before:
        raw: Any = _Dispensable(stream.buffer if stream is not None else io.BytesIO())
        encoding = getattr(stream, "encoding", None) or "utf-8"
        streams.append(io.TextIOWrapper(raw, encoding, "backslashreplace", write_through=True))
    sys.stdout, sys.stderr = streams
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for text in streams:
            text.detach()


def require_output() -> None:
    """Raise UserError when the result of the command, printed to standard output, was lost; a reader that has closed
    its pipe has enough.
    """
    lost = getattr(getattr(sys.stdout, "buffer", None), "lost", None)
    if lost is not None and lost.errno != errno.EPIPE:
        raise UserError(f"The result cannot be written to standard output ({lost.strerror}): give a file with --json.")
