"""Checks with their result and advice, and their table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text


@dataclass(frozen=True)
class Check:
    """One check. `ok` None: a remark that neither passes nor fails."""

    name: str
    ok: bool | None
    found: str
    advice: str = ""


def all_passed(checks: Sequence[Check]) -> bool:
    """Whether no check failed."""
    return all(check.ok is not False for check in checks)


def print_checks(checks: Sequence[Check], console: Console) -> None:
    """Print one line per check; the advice follows if it failed."""
    marks = {True: ("ok", "green"), False: ("no", "bold red"), None: ("--", "yellow")}
    width = max((len(check.name) for check in checks), default=0)
    for check in checks:
        text = check.found if check.ok or not check.advice else f"{check.found}: {check.advice}"
        console.print(Text.assemble(marks[check.ok], f" {check.name:{width}} {text}"), soft_wrap=True)
