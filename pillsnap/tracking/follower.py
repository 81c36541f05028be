"""The process that mirrors a run's event log to Weights & Biases; `wandb_mirror` starts and ends it.

It follows the log until its standard input closes (the driver closed the mirror, or died), and says on standard output,
one JSON object a line, `{"warning": …}` when it gave up and `{"offline": […]}`, the folders to upload, at the end.

Each task is one W&B run with the id `<run id>-<task>`, the judgement one with `<run id>-evaluation`, all in one group.
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
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from pillsnap.config import TASKS
from pillsnap.observe.priority import give_way
from pillsnap.tracking.results import EVALUATION, log_results
from pillsnap.tracking.task_run import MIRRORED_KINDS, Cursor, Target, TaskRun, alert_failure, numbered_events, wandb_id

CURSOR_FILE = "mirrored.json"


def main() -> None:
    """Follow the run that the JSON object in the first argument names: run_dir, project, group (or null), mode."""
    arguments = json.loads(sys.argv[1])
    give_way()
    # Whatever W&B prints goes to the log that standard error is, not into the conversation with the driver.
    driver = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    stop = threading.Event()
    threading.Thread(target=_await_end_of_input, args=(stop,), daemon=True).start()
    run_dir = Path(arguments["run_dir"])
    lock = (run_dir / "wandb" / "mirror.lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)  # a killed driver's mirror may still be finishing
    follower = Follower(run_dir, arguments["project"], arguments["group"], arguments["mode"])
    # W&B clears its temporary folders when Python ends in order, and this process does not.
    tempfile.tempdir = os.environ["TMPDIR"] = tempfile.mkdtemp(prefix="pillsnap-wandb-")
    try:
        follower.follow(stop)
    except Exception as error:  # the boundary to a foreign service: its failures are told, whatever their type
        traceback.print_exc()
        say(driver, warning=follower.warning(error))
        with contextlib.suppress(Exception):  # what W&B has taken is still worth writing to disk
            follower.finish_task_run()
    finally:
        say(driver, offline=[str(folder) for folder in follower.unsynced()])
        shutil.rmtree(tempfile.tempdir, ignore_errors=True)
        # W&B's threads and exit handlers may hang or fail now, and there is nothing left that they could do.
        os._exit(0)


def _await_end_of_input(stop: threading.Event) -> None:
    sys.stdin.read()
    stop.set()


def say(driver: Any, **message: Any) -> None:
    """Tell the driver; it may be gone."""
    with contextlib.suppress(OSError):
        print(json.dumps(message), file=driver, flush=True)


class Follower:
    """Opens a W&B run for each task of the log, and one for the verdict, and hands its events over."""

    def __init__(self, run_dir: Path, project: str, group: str | None, mode: str) -> None:
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
            give_way(service.pid)
        if self.mode == "auto":
            self.mode = "online" if has_key(base_url, default_url) else "offline"
        sys.stderr = _WatchedOutput(2, self.upload_failed.set)
        # W&B copies the function deeply, which a plain one survives and the bound method of a lock does not.
        self.target = Target(
            wandb, self.run_dir, self.project, self.group, self.mode, on_refused=lambda: self.upload_failed.set()
        )
        cursor = Cursor(self.run_dir / "wandb" / CURSOR_FILE)
        run: dict[str, Any] = {}
        task = ""
        for index, event in numbered_events(self.run_dir, stop):
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
        """How it ended, in a W&B run of its own: both tasks' runs are over, and theirs are other charts."""
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
            raise ConnectionError("the upload failed for good")

    def warning(self, error: Exception) -> str:
        """One line for the person who watches the run."""
        reason = " ".join(str(error).split()) or type(error).__name__
        key = os.environ.get("WANDB_API_KEY")
        if key:
            reason = reason.replace(key, "***")
        advice = ""
        if self.task_run is not None:
            folder = shlex.quote(str(self.task_run.folder))
            advice = f"; `wandb sync {folder}` uploads what was recorded until then"
        return f"Weights & Biases is not mirrored any more, training goes on: {reason[:300]}{advice}"

    def unsynced(self) -> list[Path]:
        """The offline folders of this run that were never uploaded, the detection task's first, then by age."""
        return [] if self.target is None else [folder for id_ in self.ids for folder in self.target.unsynced(id_)]


def has_key(base_url: str, default_url: str) -> bool:
    """Whether there are credentials for the W&B server `base_url`; `default_url` is the public service."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    hosts = {urlsplit(base_url).hostname}
    if base_url == default_url:
        hosts.add("api.wandb.ai")  # the public service's address of old, which netrc files still name
    try:
        known = netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return not hosts.isdisjoint(known)


class _WatchedOutput(io.TextIOWrapper):
    """Standard error that notices the one message by which W&B tells that it will not upload any more."""

    def __init__(self, fd: int, on_fatal: Callable[[], object]) -> None:
        super().__init__(os.fdopen(os.dup(fd), "wb"), encoding="utf-8", errors="backslashreplace", line_buffering=True)
        self.on_fatal = on_fatal

    def write(self, text: str) -> int:
        if "Fatal error" in text:
            self.on_fatal()
        return super().write(text)


if __name__ == "__main__":
    main()
