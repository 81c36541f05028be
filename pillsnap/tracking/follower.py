"""The process that mirrors a run's event log to Weights & Biases; started and stopped by mirror.py.

It follows the log until its standard input closes: the driver has closed the mirror, after a line, and limits the time
of the end; or it has died, and the time is limited here. Standard output has one JSON object per line: `{"warning": …}`
after a failure, and at the end `{"offline": […]}`, the folders to upload.

Each task is a W&B run with the id `<run id>-<task>`, the evaluation has `<run id>-evaluation`, all in one group.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import netrc
import os
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from pillsnap.config import TASKS
from pillsnap.observe.events import follow_events
from pillsnap.observe.priority import lower_priority
from pillsnap.tracking.results import EVALUATION, log_results
from pillsnap.tracking.task_run import MIRRORED_KINDS, POLL_INTERVAL_S, Cursor, Target, TaskRun, alert_failure, wandb_id

CURSOR_FILE = "mirrored.json"
ORPHAN_S = 8.0
"""Time to finish after the death of the driver."""
_LAST_S = 2.0


def main() -> None:
    """Mirror a run; the first argument is a JSON object with run_dir, project, group (or null) and mode."""
    arguments = json.loads(sys.argv[1])
    lower_priority()
    os.environ.pop("WANDB_SERVICE", None)  # a notebook's, which ends with it and may have another user's settings
    # W&B's output goes to standard error (mirror.log); standard output is the protocol with the driver.
    driver = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    stop = threading.Event()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_await_end_of_input, args=(stop,), daemon=True).start()
    run_dir = Path(arguments["run_dir"])
    lock = (run_dir / "wandb" / "mirror.lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)  # the mirror of a killed driver may still be finishing
    follower = Follower(
        run_dir, arguments["project"], arguments["group"], arguments["mode"], lambda text: say(driver, warning=text)
    )
    # W&B removes its temporary folders in exit handlers, which os._exit skips.
    tempfile.tempdir = os.environ["TMPDIR"] = tempfile.mkdtemp(prefix="pillsnap-wandb-")
    try:
        follower.follow(stop)
    except Exception as error:  # any failure of W&B becomes a warning
        traceback.print_exc()
        say(driver, warning=follower.warning(error))
        with contextlib.suppress(Exception):  # writes the accepted rows to disk
            follower.finish_task_run()
    finally:
        say(driver, offline=[str(folder) for folder in follower.unsynced()])
        shutil.rmtree(tempfile.tempdir, ignore_errors=True)
        # W&B's threads and exit handlers may hang, and have nothing left to do.
        os._exit(0)


def _await_end_of_input(stop: threading.Event) -> None:
    driver_lives = bool(sys.stdin.read())
    stop.set()
    if not driver_lives:  # the mirror of the next driver uploads the rest
        time.sleep(ORPHAN_S)
        signal.raise_signal(signal.SIGINT)
        time.sleep(_LAST_S)
        os._exit(0)


def say(driver: Any, **message: Any) -> None:
    """Send a message to the driver, which may have ended."""
    with contextlib.suppress(OSError):
        print(json.dumps(message), file=driver, flush=True)


class Follower:
    """Opens a W&B run for each task of the log and one for the evaluation, and passes the events on."""

    def __init__(self, run_dir: Path, project: str, group: str | None, mode: str, tell: Callable[[str], None]) -> None:
        self.tell = tell
        self.run_dir, self.project, self.group, self.mode = run_dir, project, group, mode
        self.upload_failed = threading.Event()
        self.ids: list[str] = []
        self.target: Target | None = None
        self.task_run: TaskRun | None = None

    def follow(self, stop: threading.Event) -> None:
        import wandb

        default_url = wandb.Settings().base_url
        base_url = wandb.setup().settings.base_url
        for service in psutil.Process().children():
            lower_priority(service.pid)
        if self.mode == "auto":  # `wandb disabled` and `wandb offline` write files that W&B reads here
            self.mode = {"disabled": "disabled", "offline": "offline", "dryrun": "offline"}.get(
                wandb.setup().settings.mode, "auto"
            )
        if self.mode == "disabled":
            return
        if self.mode == "auto":
            self.mode = "online" if has_key(base_url, default_url) else "offline"
        sys.stderr = _WatchedOutput(2, self.upload_failed.set)
        # W&B deep-copies the callback: a function can be copied, a bound method of an Event cannot.
        self.target = Target(
            wandb,
            self.run_dir,
            self.project,
            self.group,
            self.mode,
            on_refused=lambda: self.upload_failed.set(),
            on_offline=self.tell,
        )
        cursor = Cursor(self.run_dir / "wandb" / CURSOR_FILE)
        run: dict[str, Any] = {}
        task = ""
        for index, event in enumerate(follow_events(self.run_dir, stop, poll_interval_s=POLL_INTERVAL_S)):
            self.check_upload()
            kind = event["kind"]
            if kind == "run":
                run, task = event, task if event["run_id"] == run.get("run_id") else ""
                self.ids = [wandb_id(run, name) for name in (*TASKS, EVALUATION)]
            concerns_task = kind in MIRRORED_KINDS or (kind == "task" and event["status"] != "skipped")
            task = event["task"] if concerns_task else task
            if index < cursor.num_done or not run:
                continue
            if kind == "verdict" or (kind == "failure" and self.task_run is None):
                self._log_outcome(run, event, cursor, index)
            elif task and (concerns_task or kind == "failure" or (kind == "system" and self.task_run is not None)):
                if self.task_run is None or self.task_run.id != wandb_id(run, task):
                    self.finish_task_run()
                    self.task_run = TaskRun(self.target, cursor, run, task)
                    self.task_run.catch_up(index)
                self.task_run.mirror(event)
                cursor.num_seen = index + 1
        self.finish_task_run()

    def _log_outcome(self, run: dict[str, Any], event: dict[str, Any], cursor: Cursor, index: int) -> None:
        """Log the verdict or failure as a separate W&B run."""
        self.finish_task_run()
        assert self.target is not None
        for folder in self.target.unsynced(wandb_id(run, EVALUATION)):
            shutil.rmtree(folder)
        outcome = self.target.open(run, EVALUATION)
        if event["kind"] == "failure":
            alert_failure(outcome, event)
        else:
            log_results(self.target.wandb, outcome, self.run_dir, event)
        outcome.finish()
        self.check_upload()
        cursor.num_done = cursor.num_seen = index + 1
        cursor.save()

    def finish_task_run(self) -> None:
        if self.task_run is not None:
            self.task_run.finish()
            self.check_upload()
            self.task_run = None

    def check_upload(self) -> None:
        if self.upload_failed.is_set():
            raise ConnectionError("W&B stopped uploading")

    def warning(self, error: Exception) -> str:
        """One line for the user."""
        reason = " ".join(str(error).split()) or type(error).__name__
        key = os.environ.get("WANDB_API_KEY")
        if key:
            reason = reason.replace(key, "***")
        advice = ""
        if self.task_run is not None:
            folder = shlex.quote(str(self.task_run.folder))
            advice = f"; `wandb sync {folder}` uploads the events recorded before"
        return f"mirroring to Weights & Biases stopped, training continues: {reason[:300]}{advice}"

    def unsynced(self) -> list[Path]:
        """Offline folders of this run that were not uploaded, detection first, then by age."""
        return [] if self.target is None else [folder for id_ in self.ids for folder in self.target.unsynced(id_)]


def has_key(base_url: str, default_url: str) -> bool:
    """Whether there are credentials for the W&B server `base_url`; `default_url` is the public service."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    hosts = {urlsplit(base_url).hostname}
    if base_url == default_url:
        hosts.add("api.wandb.ai")  # the former address of the public service, still used in netrc files
    try:
        known = netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return not hosts.isdisjoint(known)


class _WatchedOutput(io.TextIOWrapper):
    """Standard error that calls `on_fatal` for the message that W&B prints when it stops uploading."""

    def __init__(self, fd: int, on_fatal: Callable[[], object]) -> None:
        super().__init__(os.fdopen(os.dup(fd), "wb"), encoding="utf-8", errors="backslashreplace", line_buffering=True)
        self.on_fatal = on_fatal

    def write(self, text: str) -> int:
        if "Fatal error" in text:
            self.on_fatal()
        return super().write(text)


if __name__ == "__main__":
    main()
