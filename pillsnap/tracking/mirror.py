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
from pillsnap.config.settings import WandbSettings

Mode = Literal["auto", "online", "offline", "disabled"]

# Covers W&B's network timeouts (30 s to start, 120 s to finish) for a task and the evaluation.
CLOSE_TIMEOUT_S = 320.0

_OF_ONE_RUN = ("WANDB_RUN_ID", "WANDB_NAME", "WANDB_RESUME", "WANDB_SWEEP_ID", "WANDB_RUN_GROUP", "WANDB_JOB_TYPE")
"""Variables of a tool that starts one W&B run; in a sweep, W&B gives every run the id in WANDB_RUN_ID."""

_log = logging.getLogger(__name__)


class WandbMirror:
    """Mirrors from `start` to `close`, which prints (`say`) and returns the `wandb sync …` line of each offline folder.

    `mode` auto: online with a key (WANDB_API_KEY or netrc) and offline without one. WANDB_MODE and WANDB_DISABLED that
    turn W&B off or offline win over any `mode`. WANDB_PROJECT replaces the default project. Each task
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
        default = WandbSettings().project
        self.project = os.environ.get("WANDB_PROJECT") or project if project == default else project
        self.group = group
        self.mode: Mode = _least(mode, _mode_from_environment())
        self._warn = on_warning or _log.warning
        self._say = say
        self._process: subprocess.Popen[str] | None = None
        self._sync_lines: list[str] = []
        self._was_stopped = False

    def start(self) -> WandbMirror:
        if self.mode == "disabled":
            return self
        for name in (name for name in _OF_ONE_RUN if os.environ.get(name)):
            self._say(f"{name} is not used: this run is several W&B runs, whose names and ids come from its run id")
        if os.environ.get("WANDB_PROJECT", self.project) != self.project:
            self._say(f"wandb.project={self.project} is used, not WANDB_PROJECT={os.environ['WANDB_PROJECT']}")
        arguments = {"run_dir": str(self.run_dir), "project": self.project, "group": self.group, "mode": self.mode}
        package_root = str(Path(pillsnap.__file__).resolve().parents[1])
        path = os.pathsep.join(filter(None, (package_root, os.environ.get("PYTHONPATH"))))
        log_path = self.run_dir / "wandb" / "mirror.log"
        try:
            log_path.parent.mkdir(parents=True, exist_ok=True)
            with log_path.open("a") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "pillsnap.tracking.follower", json.dumps(arguments)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env={
                        "WANDB_DATA_DIR": str(log_path.parent),  # files referenced by an offline folder
                        **{name: value for name, value in os.environ.items() if name not in _OF_ONE_RUN},
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
            process.stdin.write("end\n")
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
    """The mode that W&B's variables ask for; auto without them."""
    if os.environ.get("WANDB_DISABLED", "").strip().lower() in ("1", "true", "yes", "on"):
        return "disabled"
    modes: dict[str, Mode] = {
        "online": "online", "run": "online", "shared": "online", "offline": "offline", "dryrun": "offline",
        "disabled": "disabled",
    }  # fmt: skip
    return modes.get(os.environ.get("WANDB_MODE", "").strip().lower(), "auto")


def _least(chosen: Mode, asked: Mode) -> Mode:
    """The mode that sends less; `asked` decides where `chosen` is auto."""
    if chosen == "auto":
        return asked
    order = ("disabled", "offline", "auto", "online")
    return min(chosen, chosen if asked == "auto" else asked, key=order.index)
