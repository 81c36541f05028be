"""What a part of the lease hands to the process that runs it: lines for the console and figures, in one JSON file."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Report:
    """Lines and figures of one part. The file is replaced at every change: a killed part leaves what it had."""

    path: Path
    lines: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    """Findings that make the part a failure although it ran to its end."""

    def line(self, text: str, **figures: Any) -> None:
        """One line for the console, and the figures that it states."""
        print(text, flush=True)
        self.lines.append(text)
        self.figures |= figures
        self._write()

    def problem(self, text: str) -> None:
        """A finding that makes the part a failure."""
        self.problems.append(text)
        self.line(f"PROBLEM: {text}")

    def check(self, holds: bool, text: str) -> None:
        """A line that says `ok`, or a problem."""
        if holds:
            self.line(f"ok: {text}")
        else:
            self.problem(text)

    def _write(self) -> None:
        content = {"lines": self.lines, "figures": self.figures, "problems": self.problems}
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1, default=str), encoding="utf-8")
        partial.replace(self.path)


def read_report(path: Path) -> dict[str, Any]:
    """The content of a part's file; empty lists before its first line."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {"lines": [], "figures": {}, "problems": []}


@dataclass(frozen=True)
class Gate:
    """Separates a part's preparation (imports, compiling), during which others work, from its timing, during which
    nobody else does.
    """

    folder: Path
    part: str

    @property
    def ready_path(self) -> Path:
        return self.folder / f"{self.part}.ready"

    @property
    def go_path(self) -> Path:
        return self.folder / f"{self.part}.go"

    def wait(self) -> None:
        """Report readiness and wait for permission to time; exits when the process that would give it is gone."""
        parent = os.getppid()
        self.ready_path.touch()
        while not self.go_path.exists():
            if os.getppid() != parent:
                sys.exit("the process that runs the parts has ended")
            time.sleep(0.05)
