"""Starts and stops the process that mirrors a run's event log to Weights & Biases (follower.py).

The separate process isolates the driver from W&B's CPU time, output, crashes and exit handlers, and completes the
mirror after the driver was killed.
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

# Covers W&B's network timeouts (30 s to start, 120 s to finish) for a task and the evaluation.
CLOSE_TIMEOUT_S = 320.0

_log = logging.getLogger(__name__)


class WandbMirror:
    """Mirrors from `start` to `close`, which prints (`say`) and returns the `wandb sync …` line of each offline folder.

    `mode` auto: WANDB_MODE if set, else online with a key (WANDB_API_KEY or netrc) and offline without one. Each task
    is one W&B run in the group `group` (None: the run id). A failure ends mirroring and is passed once to `on_warning`,
    from a thread; details are in `run_dir`/wandb/mirror.log.
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
        self.mode: Mode = _mode_from_environment() if mode == "auto" else mode
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
                        "WANDB_DATA_DIR": str(log_path.parent),  # files referenced by an offline folder
                        **os.environ,
                        "PYTHONPATH": path,
                        "WANDB_ERROR_REPORTING": "false",
                        "GOMAXPROCS": "1",  # avoids waking two Go threads of W&B's service at each poll
                    },
                    start_new_session=True,  # Ctrl-C reaches the driver only, which closes the mirror
                )
        except OSError as error:
            self._warn(f"mirroring to Weights & Biases could not start: {error}")
            return self
        self._listener = threading.Thread(target=self._listen, args=(self._process,), name="wandb-mirror", daemon=True)
        self._listener.start()
        return self

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> list[str]:
        """Mirror the remaining events and finish, within `timeout_s`; prints how to upload offline folders."""
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
            self._warn(f"mirroring to Weights & Biases was stopped: it did not finish within {timeout_s:.0f} s")
        process.kill()  # W&B's service exits within 0.1 s after its parent
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
            self._warn("mirroring to Weights & Biases stopped, training continues: its process ended; see mirror.log")


def _mode_from_environment() -> Mode:
    """WANDB_MODE, or auto when it is unset or another value."""
    modes: dict[str, Mode] = {"online": "online", "offline": "offline", "disabled": "disabled"}
    return modes.get(os.environ.get("WANDB_MODE", ""), "auto")
