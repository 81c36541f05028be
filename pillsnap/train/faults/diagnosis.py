"""Explains an exception: what happened, the likely cause, and what to do.

Facts come first: the types and error numbers of the exception, of its causes and of those that Ray brought from other
processes, then the limits of this process. Text is searched only where it is the only fact, in errors of Ray, torch and
the CUDA libraries.
"""

from __future__ import annotations

import errno
import re
import resource
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pillsnap.errors import UserError
from pillsnap.train.faults.known_faults import DISK_FULL, FAULTS, NOT_WRITTEN, Fault

_SHOWN_CHARACTERS = 300
_FULL_BYTES = 100_000_000
"""A disk with less free space counts as full: torch names no reason when it could not write a file."""
_TEXT_ONLY = (Exception, RuntimeError, SystemError, TimeoutError, ConnectionError, OSError)
_LIBRARIES = ("ray", "torch", "safetensors", "safetensors_rust", "pyarrow", "botocore", "subprocess")
_OS_ERROR = re.compile(r"\[errno (\d+)\]|\(os error (\d+)\)", re.IGNORECASE)
_EXIT = re.compile(r"(?:\(signal |died with <?Signals\.|exit(?:ed)? (?:code|status) -)(\d+)")


@dataclass(frozen=True)
class Diagnosis:
    """Why a run ended."""

    message: str
    cause: str
    advice: str

    def __str__(self) -> str:
        return " ".join(filter(None, (self.message, self.cause, self.advice)))


def diagnose(
    error: BaseException, what: str = "Training", log: Path | str = "train.log", folder: Path | None = None
) -> Diagnosis:
    """Explain an exception of Ray, torch or the operating system to the user who gave the command.

    `what` failed; `log` has the trace; `folder` is where files were written.
    """
    links = list(_links(error))
    causes = [link for link in links if isinstance(link, UserError)]
    if causes:
        return Diagnosis(str(causes[0]), "", "")
    found = [match for link in links if (match := _fault_of(link, folder))]
    if not found:  # what an error was raised in the handling of is its cause more seldom
        contexts = [link.__context__ for link in links if link.__context__ and not link.__suppress_context__]
        found = [match for link in contexts if (match := _fault_of(link, folder)) and not _was_tried(link)]
    if found:
        fault, detail = min(found, key=lambda match: FAULTS.index(match[0]))
        cause, advice = _with_limit(fault)
        return Diagnosis(f"{fault.what} ({_shown(detail)}).", cause, advice)
    name, detail = type(links[-1]).__name__, _last_line(str(links[-1]))
    return Diagnosis(
        f"{what} failed: {_shown(f'{name}: {detail}' if detail else name)}",
        "The fault is not a known one.",
        f"The full trace is in {log}.",
    )


def _was_tried(link: BaseException) -> bool:
    """Whether the program looked whether a file is there, which is no fault."""
    return isinstance(link, OSError) and link.errno in (errno.ENOENT, errno.ENOTDIR, errno.EEXIST)


def _fault_of(link: BaseException, folder: Path | None) -> tuple[Fault, str] | None:
    """The fault that one error of the chain tells, and the words to show."""
    text = str(link)
    names = {f"{kind.__module__}.{kind.__name__}" for kind in type(link).__mro__}
    number = link.errno if isinstance(link, OSError) else None
    # An actor that fails at its start has died by its type; the error that it raised is in the last line of the text.
    inner = _OS_ERROR.search(_last_line(text)) if number is None and _speaks(link) else None
    stated = number if inner is None else int(inner[1] or inner[2])
    by_number = [fault for fault in FAULTS if stated in fault.errnos]
    if known := by_number or [fault for fault in FAULTS if names & {*fault.types}]:
        return known[0], _last_line(text) or type(link).__name__
    if number is not None or not _speaks(link):
        return None
    for line in filter(None, (part.strip() for part in text.splitlines())):
        number = _signal_in(link, line)
        told = _OS_ERROR.search(line)
        for fault in FAULTS:
            if (number in fault.signals) or (told and int(told[1] or told[2]) in fault.errnos) or fault.says(line):
                return (DISK_FULL if fault is NOT_WRITTEN and _is_full(folder) else fault), line
    return None


def _speaks(link: BaseException) -> bool:
    """Whether the text of the error is that of a library or the loader; a KeyError's text is somebody's key."""
    if isinstance(link, ImportError):
        return (link.path or "").endswith(".so")
    return type(link) in _TEXT_ONLY or type(link).__module__.split(".")[0] in _LIBRARIES


def _signal_in(link: BaseException, line: str) -> int | None:
    """The signal that ended a process, from its exit status."""
    status = getattr(link, "returncode", None)
    if not isinstance(status, int):
        told = _EXIT.search(line)
        status = -int(told[1]) if told else None
    if status is not None and status > 128:  # as a shell says it
        status = 128 - status
    return -status if status is not None and status < 0 else None


def _with_limit(fault: Fault) -> tuple[str, str]:
    """Cause and advice, naming the limit that is set; the driver's limits are those of its workers."""
    if fault.limit is not None:
        letter, kind = fault.limit
        allowed = resource.getrlimit(kind)[0]
        if allowed != resource.RLIM_INFINITY:
            unit = 1024 if letter in "vf" else 1
            return f"{fault.cause} `ulimit -{letter}` is {allowed // unit}.", fault.advice
    return fault.cause, fault.advice


def _is_full(folder: Path | None) -> bool:
    try:
        return folder is not None and shutil.disk_usage(folder).free < _FULL_BYTES
    except OSError:
        return False


def _links(error: BaseException) -> Iterator[BaseException]:
    """The exception and its causes, outermost first; Ray keeps the workers' exceptions in its own fields."""
    seen: set[int] = set()
    waiting: list[BaseException] = [error]
    while waiting:
        link = waiting.pop(0)
        if id(link) in seen:
            continue
        seen.add(id(link))
        failures = getattr(link, "worker_failures", None)
        inner = [*failures.values()] if isinstance(failures, dict) else []
        inner += [getattr(link, "controller_failure", None), getattr(link, "cause", None), link.__cause__]
        inner += getattr(link, "exceptions", ())
        causes = [item for item in inner if isinstance(item, BaseException)]
        waiting += causes
        if not causes or not hasattr(link, "traceback_str"):  # a RayTaskError's text is that of its cause
            yield link


def _shown(text: str) -> str:
    return " ".join(text.split())[:_SHOWN_CHARACTERS]


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
