"""One part of the lease as a process: log file, time limit, and an end that takes every descendant along.

Ray's processes outlive the program that started them when that is killed. All descendants carry an environment
variable with the job's name, by which they are found and killed by their process ids.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.lease.report import read_report

MARK = "PILLSNAP_LEASE_JOB"


@dataclass
class Job:
    """One part, from its start to its end."""

    name: str
    folder: Path
    limit_s: float
    """Seconds from the start of the process after which it is killed."""
    nice: int = 0
    """How far it yields the processors to others, 0 to 19."""
    extra_env: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    started_s: float = 0.0
    ended_s: float = 0.0
    status: str = ""
    """How it ended: `ok`, `exit status N`, `found problems`, or why it was killed; empty while it runs."""
    lines_shown: int = 0

    @property
    def mark(self) -> str:
        return f"{self.folder}:{self.name}"

    @property
    def log_path(self) -> Path:
        return self.folder / "logs" / f"{self.name}.log"

    @property
    def result_path(self) -> Path:
        return self.folder / f"{self.name}.json"

    @property
    def running(self) -> bool:
        return self.process is not None and not self.status

    @property
    def seconds(self) -> float:
        return (self.ended_s or time.monotonic()) - self.started_s if self.started_s else 0.0

    def start(self, quick: bool) -> None:
        """Start the part's process, its output in the log."""
        command = [sys.executable, "-m", "benchmarks.lease.part", self.name, "--folder", str(self.folder)]
        command += ["--quick"] * quick
        environment = os.environ | self.extra_env | {MARK: self.mark, "PYTHONUNBUFFERED": "1"}
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
            )
        self.started_s = time.monotonic()
        if self.nice:
            with suppress(psutil.Error):
                psutil.Process(self.process.pid).nice(self.nice)

    def poll(self) -> None:
        """Notice that it has ended, or kill it when it is over its limit."""
        if not self.running:
            return
        assert self.process is not None
        code = self.process.poll()
        if code is not None:
            problems = read_report(self.result_path)["problems"]
            self.end("found problems" if problems and code == 0 else "ok" if code == 0 else f"exit status {code}")
        elif time.monotonic() - self.started_s > self.limit_s:
            self.end(f"killed after {self.limit_s:.0f} s")

    def end(self, status: str) -> None:
        """Set the status and kill what is left of the process and its descendants."""
        if not self.running:
            return
        self.status, self.ended_s = status, time.monotonic()
        assert self.process is not None
        kill_marked(self.mark)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(5)

    def raise_priority(self) -> None:
        """Give the whole tree the priority that timed code has; only root may."""
        for one in marked(self.mark):
            with suppress(psutil.Error):
                one.nice(0)

    def new_lines(self) -> list[str]:
        """Lines that the part has reported since the last call."""
        lines = read_report(self.result_path)["lines"]
        fresh, self.lines_shown = lines[self.lines_shown :], len(lines)
        return fresh

    def outcome(self) -> dict[str, Any]:
        """For the JSON file."""
        return {"status": self.status or "running", "seconds": round(self.seconds, 1)} | read_report(self.result_path)


def marked(mark: str) -> list[psutil.Process]:
    """All processes of a job, or of all jobs whose mark begins with this."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK, "").startswith(mark) and process.pid != os.getpid():
                found.append(process)
    return found


def kill_marked(mark: str) -> None:
    """Kill them; twice, as the first round may have met processes in the middle of a fork."""
    for _ in range(2):
        left = marked(mark)
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=2)
