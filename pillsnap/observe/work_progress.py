"""Progress of work that is counted in photos, files or samples: a bar on a terminal, else a line every ten seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

LINE_S = 10.0
Progress = Callable[..., None]
"""Called with (done, total) or (phase, done, total); a total of 0 is not known yet."""


def unseen(*_: object) -> None:
    """Progress that nobody watches."""


@contextmanager
def progress_bar(what: str, console: Console) -> Iterator[Progress]:
    """What is done of how much, the rate per second and the time left. A phase that took less than ten seconds leaves
    no line.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        bar = bars.add_task(what, total=None, speed="")
        pace = _Pace()

        def update(*step: Any) -> None:
            *phase, done, total = step
            description = ": ".join([what, *phase])
            speed = pace.speed(description, done, total)
            bars.update(bar, completed=done, total=total or None, description=description, speed=speed)
            if not console.is_terminal and pace.line_is_due(done, total):
                of = f" of {total:,}" if total else ""
                console.out("  ".join(filter(None, (f"{description}  {done:,}{of}", speed))), highlight=False)

        yield update


class _Pace:
    """Rate since the first call of a phase: work done before, such as in an earlier start, does not count."""

    def __init__(self) -> None:
        self._phase: str | None = None

    def speed(self, phase: str, done: int, total: int) -> str:
        """Such as "148/s  1:43 left"; empty while it is not known."""
        from pillsnap.observe.progress import format_duration

        now_s = time.monotonic()
        if phase != self._phase:
            self._phase, self._first, self._started_s, self._line_s = phase, done, now_s, now_s
        new, seconds = done - self._first, now_s - self._started_s
        if new <= 0 or seconds <= 0:
            return ""
        rate = new / seconds
        left = f"  {format_duration((total - done) / rate)} left" if total > done else ""
        return f"{rate:,.0f}/s{left}" if rate >= 1 else f"{1 / rate:.1f} s each{left}"

    def line_is_due(self, done: int, total: int) -> bool:
        now_s = time.monotonic()
        due = now_s - self._line_s >= LINE_S or (0 < total <= done and now_s - self._started_s >= LINE_S)
        if due:
            self._line_s = now_s
        return due
