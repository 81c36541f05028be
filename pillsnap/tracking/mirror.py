"""Mirrors a run's event log to Weights & Biases without training noticing it.

A process of its own does the work (`wandb_follower`): neither its time, its output, its crash nor its exit handlers are
the driver's, and it takes what is left of a killed driver's log to the end.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pillsnap

Mode = Literal["auto", "online", "offline", "disabled"]

# W&B's own waits for the network (30 s to begin, 120 s to finish) have passed by then, for a task and the judgement.
CLOSE_TIMEOUT_S = 320.0

_log = logging.getLogger(__name__)


class WandbMirror:
    """Mirrors from `start` to `close`, which returns and says the `wandb sync …` line of each offline folder.

    `mode` auto is what WANDB_MODE says, else online with a key (WANDB_API_KEY or netrc) and offline without one. Both
    tasks of the run get a W&B run each, in the group `group` (the run's id where None). Whatever fails is told once to
    `on_warning`, from a thread, and mirroring ends; details are in `run_dir`/wandb/mirror.log.
    """

    def __init__(
        self,
        run_dir: Path,
        project: str,
        group: str | None = None,
        mode: Mode = "auto",
        on_warning: Callable[[str], None] | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self.run_dir = run_dir.resolve()
        self.project = project
        self.group = group
        self.mode: Mode = _wished_mode() if mode == "auto" else mode
        self._warn = on_warning or _log.warning
        self._say = say
        self._process: subprocess.Popen[str] | None = None
        self._sync_lines: list[str] = []
        self._was_stopped = False

    def start(self) -> WandbMirror:
        if self.mode == "disabled":
            return self
        arguments = {"run_dir": str(self.run_dir), "project": self.project, "group": self.group, "mode": self.mode}
        package_root = str(Path(pillsnap.__file__).resolve().parents[1])
        path = os.pathsep.join(filter(None, (package_root, os.environ.get("PYTHONPATH"))))
        log_path = self.run_dir / "wandb" / "mirror.log"
        try:
            log_path.parent.mkdir(parents=True, exist_ok=True)
            with log_path.open("a") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "pillsnap.tracking.follower", json.dumps(arguments)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env={
                        "WANDB_DATA_DIR": str(log_path.parent),  # what an offline folder refers to stays beside it
                        **os.environ,
                        "PYTHONPATH": path,
                        "WANDB_ERROR_REPORTING": "false",
                        "GOMAXPROCS": "1",  # else W&B's service, written in Go, wakes two threads at each look
                    },
                    start_new_session=True,  # Ctrl-C is for the driver, which then closes the mirror
                )
        except OSError as error:
            self._warn(f"Weights & Biases is not mirrored: {error}")
            return self
        self._listener = threading.Thread(target=self._listen, args=(self._process,), name="wandb-mirror", daemon=True)
        self._listener.start()
        return self

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> list[str]:
        """Mirror what is left, finish, and say how to upload what stayed offline. Waits `timeout_s` at most."""
        if self._process is None:
            return self._sync_lines
        process, self._process = self._process, None
        assert process.stdin is not None
        with contextlib.suppress(OSError):  # it may be dead
            process.stdin.close()
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._was_stopped = True
            self._warn(f"Weights & Biases did not finish within {timeout_s:.0f} s and was stopped")
        process.kill()  # its service ends itself within 0.1 s, when it has no parent any more
        process.wait()
        self._listener.join()
        for line in self._sync_lines:
            self._say(line)
        return self._sync_lines

    def __enter__(self) -> WandbMirror:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        ended_well = False
        for line in process.stdout:
            message = json.loads(line)
            if "warning" in message:
                self._warn(message["warning"])
            else:
                ended_well = True
                self._sync_lines = [f"wandb sync {shlex.quote(folder)}" for folder in message["offline"]]
        if not ended_well and not self._was_stopped:
            self._warn("Weights & Biases is not mirrored any more, training goes on: its process ended; see mirror.log")


def _wished_mode() -> Mode:
    """What WANDB_MODE says; auto where it says nothing that makes sense here."""
    modes: dict[str, Mode] = {"online": "online", "offline": "offline", "disabled": "disabled"}
    return modes.get(os.environ.get("WANDB_MODE", ""), "auto")
