"""Ends what the main thread waits for, in native code too, when a limit is reached, a signal or a fact says so."""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

GRACE_S = 5.0
"""Time for the main thread to return from native code; then the process ends."""
_WAKE = signal.SIGUSR2
_STOPS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def interrupted_by(
    causes: Mapping[int, BaseException], limit_s: float | None = None, late: BaseException | None = None
) -> Iterator[None]:
    """Raise in the body the exception of the first descriptor of `causes` that becomes readable, or `late` after
    `limit_s`. Where the body stays in native code, the process ends with that exception as its last line.

    Signals reach the main thread alone: in other threads the body runs as it is.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    found: list[BaseException] = []
    left = threading.Event()
    ended, end = os.pipe()

    def interrupt(_: int, __: FrameType | None) -> None:
        if not left.is_set():
            left.set()
            raise KeyboardInterrupt  # the one exception that Ray's waiting passes on

    def wait() -> None:
        poll = select.poll()
        for descriptor in (*causes, ended):
            poll.register(descriptor, select.POLLIN)
        ready = [descriptor for descriptor, _ in poll.poll(None if limit_s is None else 1000 * limit_s)]
        cause = next((causes[descriptor] for descriptor in ready if descriptor in causes), None if ready else late)
        if cause is not None:
            found.append(cause)
            signal.pthread_kill(threading.main_thread().ident or 0, _WAKE)
            if not left.wait(GRACE_S):
                _end_process(cause)

    before = signal.signal(_WAKE, interrupt)
    watcher = threading.Thread(target=wait, name="interruption", daemon=True)
    try:
        watcher.start()
        yield
    except KeyboardInterrupt:
        if found:
            raise found[0] from None
        raise
    finally:
        left.set()
        os.close(end)
        watcher.join()
        os.close(ended)
        signal.signal(_WAKE, before)


@contextmanager
def stoppable(limit_s: float | None = None, late: BaseException | None = None) -> Iterator[None]:
    """Raise KeyboardInterrupt in the body at SIGINT or SIGTERM, whatever handlers it installs, and `late` after
    `limit_s`.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked, write = os.pipe()
    os.set_blocking(write, False)
    obeyed = [signum for signum in _STOPS if signal.getsignal(signum) is not signal.SIG_IGN]
    handlers = {signum: signal.signal(signum, lambda *_: None) for signum in obeyed}
    descriptor = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    try:
        with interrupted_by({asked: KeyboardInterrupt()}, limit_s, late):
            yield
    except SystemExit:  # Ray's own handler of SIGTERM
        raise KeyboardInterrupt from None
    finally:
        signal.set_wakeup_fd(descriptor)
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        os.close(asked)
        os.close(write)


def _end_process(cause: BaseException) -> NoReturn:
    os.write(2, f"pillsnap: {str(cause) or 'interrupted'}\n".encode())
    os._exit(130 if isinstance(cause, KeyboardInterrupt) else 2)
