"""Output of the commands: lines, progress bars, and the exit code of an interruption."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

STOPPED = 130
console = Console()


def say(line: str, style: str | None = None) -> None:
    """Print one line as it is, without markup, emoji codes, line breaks or colours other than `style`."""
    console.out(line, style=style, highlight=False)


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[..., None]]:
    """A progress bar, updated by calls of (done, total) or (phase, done, total)."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        bar = bars.add_task(what, total=None)

        def update(*step: Any) -> None:
            *phase, done, total = step
            description = f"{what}: {phase[0]}" if phase else what
            bars.update(bar, completed=done, total=total or None, description=description)

        yield update
