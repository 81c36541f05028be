"""Ends what the main thread waits for, in native code too, when a limit is reached, a signal or a fact says so."""

from __future__ import annotations

import math
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

GRACE_S = 5.0
"""Time for the body to end, which may be in native code; then the process ends."""
_LOOK_S = 0.5
_WAKE = signal.SIGUSR2
_STOPS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def interrupted_by(
    causes: Mapping[int, BaseException],
    limit_s: float = math.inf,
    late: BaseException | None = None,
    look: Callable[[], BaseException | None] | None = None,
) -> Iterator[None]:
    """Raise in the body the exception of the first descriptor of `causes` that becomes readable, what `look` returns
    (asked twice per second), or `late` after `limit_s`. Where the body does not end within GRACE_S, because it is in
    native code or cleans up, the process ends with that exception as its last line.

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
            raise KeyboardInterrupt  # the one exception that Ray's waiting passes on

    def wait() -> None:
        poll = select.poll()
        for descriptor in (*causes, ended):
            poll.register(descriptor, select.POLLIN)
        end_s = time.monotonic() + limit_s
        cause: BaseException | None = None
        while cause is None:
            left_s = min(end_s - time.monotonic(), _LOOK_S if look else math.inf)
            ready = [descriptor for descriptor, _ in poll.poll(None if left_s == math.inf else 1000 * max(0.0, left_s))]
            if ended in ready:
                return
            cause = causes[ready[0]] if ready else late if time.monotonic() >= end_s else look() if look else None
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
def stoppable(
    limit_s: float = math.inf,
    late: BaseException | None = None,
    look: Callable[[], BaseException | None] | None = None,
) -> Iterator[None]:
    """Raise KeyboardInterrupt in the body at SIGINT or SIGTERM, whatever handlers it installs; the rest as above."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked, write = os.pipe()
    os.set_blocking(write, False)
    obeyed = [signum for signum in _STOPS if signal.getsignal(signum) is not signal.SIG_IGN]
    handlers = {signum: signal.signal(signum, lambda *_: None) for signum in obeyed}
    descriptor = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    try:
        with interrupted_by({asked: KeyboardInterrupt()}, limit_s, late, look):
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
