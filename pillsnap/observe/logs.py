"""Logging to the console and to `train.log` in the run directory, shared by the driver and all workers."""

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
"""Logger of events: one line per event in `train.log`, none on the console."""

_EVENT_LEVELS = {"step": logging.DEBUG, "system": logging.DEBUG, "evaluation": logging.DEBUG}
_EVENT_LEVELS |= {"quarantine": logging.WARNING, "warning": logging.WARNING, "failure": logging.ERROR}

_SECRET_ENDINGS = ("KEY", "TOKEN", "SECRET", "PASSWORD")


def setup_logging(
    run_dir: Path, level: str = "INFO", rank: int | None = None, send: Callable[[str], None] | None = None
) -> None:
    """Log the package to the console and to `run_dir`/train.log; a second call replaces the handlers of the first.

    Lines of a worker carry its `rank`; the driver has none. The file is rotated at 10 MB, with five old files kept.
    Values of environment variables named like keys or passwords are masked. `send` replaces the file as destination.
    UserError for an unknown level.
    """
    if level.upper() not in LEVELS:
        raise UserError(f"unknown log level {level!r}: use one of {', '.join(LEVELS)}")
    run_dir.mkdir(parents=True, exist_ok=True)
    origin = "driver" if rank is None else f"rank {rank}"
    logger = logging.getLogger("pillsnap")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(level.upper())
    secrets = [value for name, value in os.environ.items() if name.endswith(_SECRET_ENDINGS) and len(value) >= 8]
    line = f"%(asctime)s %(levelname)-7s {origin:8} %(name)s: %(message)s"
    for handler, form in (
        (_SendingHandler(send) if send else SharedRotatingHandler(run_dir / LOG_FILE), line),
        (_ConsoleHandler(), "%(levelname)s %(message)s" if rank is None else f"%(levelname)s {origin}: %(message)s"),
    ):
        handler.setFormatter(_MaskingFormatter(form, secrets))
        logger.addHandler(handler)


def current_level() -> str:
    """The level set by `setup_logging` in this process, INFO without it; passed on to the workers."""
    level = logging.getLogger("pillsnap").level
    return logging.getLevelName(level) if level else "INFO"


def log_file() -> Path | None:
    """The file that `setup_logging` writes to in this process."""
    handlers = logging.getLogger("pillsnap").handlers
    return next((handler.path for handler in handlers if isinstance(handler, SharedRotatingHandler)), None)


def log_event(kind: str, fields: Mapping[str, Any]) -> None:
    """Log an event as one line: `epoch task=detection epoch=3 loss=0.41`, without settings and versions.

    Steps and system events are logged at DEBUG. Does nothing before `setup_logging`.
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
    """The last lines of a run's log; with `follow`, also new lines until `stop` is set. UserError without a log."""
    path = run_dir / LOG_FILE
    if not path.exists():
        raise UserError(f"{path} does not exist: pass the directory of a run started by `pillsnap train`")
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
    """A rotating log file shared by processes: one process rotates a full file, the others reopen it."""

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
            # Another process may have rotated the file while this one waited for the lock.
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
    """Writes to the current sys.stderr, which progress bars replace while they are shown.

    Left out are events, which the progress view shows, and records with the extra field `file_only`.
    """

    def __init__(self) -> None:
        logging.Handler.__init__(self)
        self.addFilter(lambda record: record.name != EVENT_LOGGER and not hasattr(record, "file_only"))

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
