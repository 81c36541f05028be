"""Logging of a run: the console and `train.log` in the run directory, which the driver and all workers share."""

from __future__ import annotations

import fcntl
import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from logging.handlers import WatchedFileHandler
from pathlib import Path
from typing import Any, TextIO

from pillsnap.errors import UserError

LOG_FILE = "train.log"
MAX_LOG_BYTES = 10_000_000
NUM_OLD_LOGS = 5
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")

EVENT_LOGGER = "pillsnap.events"
"""What happens to the run goes here, one line an event, for `train.log`."""

_EVENT_LEVELS = {"step": logging.DEBUG, "system": logging.DEBUG, "quarantine": logging.WARNING}
_EVENT_LEVELS |= {"warning": logging.WARNING, "failure": logging.ERROR}

_SECRET_ENDINGS = ("KEY", "TOKEN", "SECRET", "PASSWORD")


def setup_logging(
    run_dir: Path, level: str = "INFO", rank: int | None = None, send: Callable[[str], None] | None = None
) -> None:
    """Send the package's log to the console and to `run_dir`/train.log; calling it again replaces the first.

    `rank` marks a worker's lines (the driver has none). The file is rotated at 10 MB, five old ones are kept. Values of
    environment variables that look like keys or passwords are masked. With `send`, lines go there instead of to the
    file. UserError for an unknown level.
    """
    if level.upper() not in LEVELS:
        raise UserError(f"unknown log level {level!r}: use one of {', '.join(LEVELS)}")
    run_dir.mkdir(parents=True, exist_ok=True)
    who = "driver" if rank is None else f"rank {rank}"
    logger = logging.getLogger("pillsnap")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(level.upper())
    secrets = [value for name, value in os.environ.items() if name.endswith(_SECRET_ENDINGS) and len(value) >= 8]
    line = f"%(asctime)s %(levelname)-7s {who:8} %(name)s: %(message)s"
    for handler, form in (
        (_SendingHandler(send) if send else SharedRotatingHandler(run_dir / LOG_FILE), line),
        (_ConsoleHandler(), "%(levelname)s %(message)s" if rank is None else f"%(levelname)s {who}: %(message)s"),
    ):
        handler.setFormatter(_MaskingFormatter(form, secrets))
        logger.addHandler(handler)


def current_level() -> str:
    """The level that `setup_logging` set in this process, so that workers can be given the same; INFO without it."""
    level = logging.getLogger("pillsnap").level
    return logging.getLevelName(level) if level else "INFO"


def log_event(kind: str, fields: Mapping[str, Any]) -> None:
    """An event as a line of the log: `epoch task=detection epoch=3 loss=0.41`; the bulky parts are left out.

    Steps are at DEBUG. Nothing is said where logging was not set up.
    """
    logger, level = logging.getLogger(EVENT_LOGGER), _EVENT_LEVELS.get(kind, logging.INFO)
    if not (logger.isEnabledFor(level) and logger.hasHandlers()):
        return
    parts = []
    for name, value in fields.items():
        if name in ("config", "versions") or value in ("", None):
            continue
        if isinstance(value, Mapping):
            value = ",".join(f"{key}:{_short(item)}" for key, item in value.items())
        parts.append(f"{name}={_short(value)}")
    logger.log(level, "%s", " ".join([kind, *parts]).replace("\n", " "))


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def tail_log(
    run_dir: Path, num_lines: int = 200, follow: bool = False, stop: threading.Event | None = None
) -> Iterator[str]:
    """The last lines of a run's log; with `follow`, then each new line until `stop` is set. UserError without a log."""
    path = run_dir / LOG_FILE
    if not path.exists():
        raise UserError(f"{path} is not there: name the directory of a run that `pillsnap train` has started")
    stop = stop or threading.Event()
    file = path.open(encoding="utf-8", errors="replace")
    try:
        yield from (line.rstrip("\n") for line in deque(file, maxlen=num_lines))
        while follow and not stop.is_set():
            line = file.readline()
            if line:
                yield line.rstrip("\n")
            elif path.exists() and not os.path.samestat(os.fstat(file.fileno()), path.stat()):  # rotated
                file.close()
                file = path.open(encoding="utf-8", errors="replace")
            else:
                stop.wait(0.2)
    finally:
        file.close()


class SharedRotatingHandler(WatchedFileHandler):
    """A rotating file that several processes append to; whoever finds it full rotates it, the others follow."""

    def __init__(self, path: Path, max_bytes: int = MAX_LOG_BYTES, num_old: int = NUM_OLD_LOGS) -> None:
        super().__init__(path, encoding="utf-8", errors="backslashreplace")
        self.path = path
        self.max_bytes = max_bytes
        self.num_old = num_old

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.reopenIfNeeded()
            assert self.stream is not None
            if os.fstat(self.stream.fileno()).st_size >= self.max_bytes:
                self._rotate()
        except OSError:
            self.handleError(record)
            return
        super().emit(record)

    def _rotate(self) -> None:
        assert self.stream is not None
        fcntl.flock(self.stream, fcntl.LOCK_EX)
        try:
            # Another process may have rotated while this one waited for the lock.
            if self._is_current(self.stream.fileno()):
                for number in range(self.num_old, 0, -1):
                    newer = self._numbered(number - 1)
                    if newer.exists():
                        newer.replace(self._numbered(number))
        finally:
            fcntl.flock(self.stream, fcntl.LOCK_UN)
        self.reopenIfNeeded()

    def _is_current(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.fstat(fd), self.path.stat())
        except FileNotFoundError:
            return False

    def _numbered(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}") if number else self.path


class _SendingHandler(logging.Handler):
    def __init__(self, send: Callable[[str], None]) -> None:
        super().__init__()
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        self._send(self.format(record))


class _ConsoleHandler(logging.StreamHandler[TextIO]):
    """Writes to whatever sys.stderr is at the moment: progress bars replace it while they are drawn.

    Events stay out of it: on the console the progress view shows them.
    """

    def __init__(self) -> None:
        logging.Handler.__init__(self)
        self.addFilter(lambda record: record.name != EVENT_LOGGER)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


class _MaskingFormatter(logging.Formatter):
    def __init__(self, form: str, secrets: list[str]) -> None:
        super().__init__(form)
        self.secrets = secrets

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return text
