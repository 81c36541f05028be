"""The process that mirrors a run's event log to Weights & Biases; `wandb_mirror` starts and ends it.

It follows the log until its standard input closes (the driver closed the mirror, or died), and says on standard output,
one JSON object a line, `{"warning": …}` when it gave up and `{"offline": […]}`, the folders to upload, at the end.

Each task is one W&B run with the id `<run id>-<task>`, both in one group. W&B's row number is the task's global step: a
row holds the step, the epoch and the validation that belong together, and a row that is sent twice is the same row.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import netrc
import os
import re
import shlex
import shutil
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pillsnap.observe.events import TASKS, EventFollower

INIT_TIMEOUT_S = 30.0
FINISH_TIMEOUT_S = 60.0
CURSOR_FILE = "mirrored.json"

_MIRRORED_KINDS = ("step", "epoch", "validation", "examples")
_STEP_FIGURES = ("loss", "lr", "images_per_s", "data_wait_fraction", "gpu_memory_bytes")
_EPOCH_FIGURES = ("loss", "images_per_s", "data_wait_fraction", "duration_s")


def main() -> None:
    """Follow the run that the JSON object in the first argument names: run_dir, project, group (or null), mode."""
    arguments = json.loads(sys.argv[1])
    # Whatever W&B prints goes to the log that standard error is, not into the conversation with the driver.
    driver = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    stop = threading.Event()
    threading.Thread(target=_await_end_of_input, args=(stop,), daemon=True).start()
    run_dir = Path(arguments["run_dir"])
    lock = (run_dir / "wandb" / "mirror.lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)  # a killed driver's mirror may still be finishing
    follower = Follower(run_dir, arguments["project"], arguments["group"], arguments["mode"])
    try:
        follower.follow(stop)
    except Exception as error:  # the boundary to a foreign service: its failures are told, whatever their type
        traceback.print_exc()
        say(driver, warning=follower.warning(error))
        with contextlib.suppress(Exception):  # what W&B has taken is still worth writing to disk
            follower.finish_task_run()
    finally:
        say(driver, offline=[str(folder) for folder in follower.unsynced()])
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
    """Opens a W&B run for each task of the log and hands its events over."""

    def __init__(self, run_dir: Path, project: str, group: str | None, mode: str) -> None:
        self.run_dir, self.project, self.group, self.mode = run_dir, project, group, mode
        self.upload_failed = threading.Event()
        self.ids: list[str] = []
        self.task_run: TaskRun | None = None

    def follow(self, stop: threading.Event) -> None:
        import wandb

        default_url = wandb.Settings().base_url
        if self.mode == "auto":
            self.mode = "online" if has_key(wandb.setup().settings.base_url, default_url) else "offline"
        sys.stderr = _WatchedOutput(2, self.upload_failed.set)
        cursor = Cursor(self.run_dir / "wandb" / CURSOR_FILE)
        run: dict[str, Any] = {}
        task = ""
        for index, event in numbered_events(self.run_dir, stop):
            self.check_upload()
            kind = event["kind"]
            if kind == "run":
                run = event
                self.ids = [wandb_id(run, name) for name in TASKS]
            concerns_task = kind in _MIRRORED_KINDS or (kind == "task" and event["status"] == "started")
            task = event["task"] if concerns_task else task
            if index < cursor.num_done or not run or not task:
                continue
            if not concerns_task and kind not in ("verdict", "failure"):
                continue
            if self.task_run is None or self.task_run.id != wandb_id(run, task):
                self.finish_task_run()
                self.task_run = TaskRun(wandb, self, cursor, run, task)
                self.task_run.catch_up(index)
            self.task_run.mirror(event)
            cursor.num_seen = index + 1
        self.finish_task_run()

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
        return [folder for id_ in self.ids for folder in self.unsynced_of(id_)]

    def unsynced_of(self, id_: str) -> list[Path]:
        folders = sorted((self.run_dir / "wandb").glob(f"offline-run-????????_??????-{id_}*"))
        return [folder.resolve() for folder in folders if not list(folder.glob("*.wandb.synced"))]


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


class TaskRun:
    """One task's W&B run. Each event goes there once, however often training or this process is killed and resumed."""

    def __init__(self, wandb: Any, follower: Follower, cursor: Cursor, run: dict[str, Any], task: str) -> None:
        self.id = wandb_id(run, task)
        self.run_id, self.task = run["run_id"], task
        self.run_dir, self.cursor, self.wandb = follower.run_dir, cursor, wandb
        self.position = 0
        unsynced = follower.unsynced_of(self.id)
        if follower.mode == "offline" and unsynced:
            # A killed process may have lost rows that it had handed over, and the event log has them all: begin again.
            for folder in unsynced:
                shutil.rmtree(folder)
            cursor.marks.pop(self.id, None)
        self.run = wandb.init(
            project=follower.project,
            dir=str(follower.run_dir.resolve()),
            id=self.id,
            name=f"{run['name']}-{task}",
            group=follower.group or run["run_id"],
            job_type=task,
            tags=[f"stage{run['stage']}" if isinstance(run["stage"], int) else str(run["stage"] or "run"), task],
            config={**run["config"], **{key: run[key] for key in ("manifest_hash", "num_workers", "versions")}},
            mode=follower.mode,
            resume="allow",
            reinit="create_new",
            allow_val_change=True,
            settings=_settings(wandb, on_refused=lambda: follower.upload_failed.set()),
        )
        self.folder = Path(self.run.settings.sync_dir)
        self.run.define_metric("global_step", hidden=True)
        self.run.define_metric("*", step_metric="global_step")
        known = cursor.marks.get(self.id, {})
        if follower.mode == "online":
            # The server knows which rows arrived; of a row that did, the cursor knows what was in it.
            last_row = self.run.starting_step - 1
            known = {kind: min(step, last_row) for kind, step in known.items()} | {"step": last_row}
        self.marks: dict[str, int] = dict.fromkeys(_MIRRORED_KINDS, 0) | known

    def catch_up(self, end: int) -> None:
        """Mirror this task's events among the first `end` of the log."""
        stop = threading.Event()
        stop.set()
        run_id = ""
        for index, event in numbered_events(self.run_dir, stop):
            if index >= end:
                return
            if event["kind"] == "run":
                run_id = event["run_id"]
            if run_id == self.run_id and event.get("task") == self.task:
                self.mirror(event)

    def mirror(self, event: dict[str, Any]) -> None:
        kind = event["kind"]
        if kind == "verdict":
            self._verdict(event)
        elif kind == "failure":
            self.run.alert(
                "Run failed", f"{event['message']} {event['cause']} {event['advice']}".strip(), level="ERROR"
            )
        if kind not in _MIRRORED_KINDS:
            return
        # After a restart a task repeats steps, with the same samples and so the same figures: the first ones stay.
        self.position = step = event.get("step", self.position)
        if step <= self.marks[kind]:
            return
        row = self._row(event)
        if row:
            row |= {"global_step": step, "epoch": event["epoch"], "_timestamp": event["time"]}
            self.run.log(row, step=max(step, self.run.step))
        if kind == "validation" and event["best"]:
            self.run.summary.update({f"best/{name}": value for name, value in row.items() if name.startswith("val/")})
            self.run.summary["best/epoch"] = event["epoch"]
        self.marks[kind] = step
        if kind != "step":
            self.cursor.marks[self.id] = self.marks
            self.cursor.save()

    def finish(self) -> None:
        self.run.finish()
        self.cursor.marks[self.id] = self.marks
        self.cursor.num_done = self.cursor.num_seen
        self.cursor.save()

    def _row(self, event: dict[str, Any]) -> dict[str, Any]:
        if event["kind"] == "step":
            row = {f"train/{name}": event[name] for name in _STEP_FIGURES}
            row |= {f"train/loss_{name}": value for name, value in event["losses"].items()}
        elif event["kind"] == "epoch":
            row = {f"epoch/{name}": event[name] for name in _EPOCH_FIGURES}
        elif event["kind"] == "validation":
            row = {f"val/{name}": value for name, value in event["metrics"].items()}
        else:
            picture = self.run_dir / event["path"]
            caption = f"{self.task}, epoch {event['epoch']}"
            row = {"examples": self.wandb.Image(str(picture), caption=caption)} if picture.exists() else {}
        return {name: value for name, value in row.items() if value is not None}

    def _verdict(self, event: dict[str, Any]) -> None:
        self.run.summary["verdict/met"] = event["met"]
        for name, target in event["targets"].items():
            self.run.summary.update({f"verdict/{name}": target["value"], f"verdict/{name}_target": target["target"]})
        met = sum(target["met"] for target in event["targets"].values())
        title = "Targets met" if event["met"] else "Targets missed"
        self.run.alert(title, f"{met} of {len(event['targets'])} targets met", level="INFO" if event["met"] else "WARN")


class Cursor:
    """What was mirrored before this process: in a small file, so that a resumed run goes on where it was."""

    def __init__(self, path: Path) -> None:
        self.path = path
        data: dict[str, Any] = {}
        if path.exists():
            with contextlib.suppress(ValueError):
                data = json.loads(path.read_text())
        self.num_done: int = data.get("num_done", 0)  # events of the log that are in finished W&B runs
        self.num_seen = self.num_done
        self.marks: dict[str, dict[str, int]] = data.get("marks", {})  # W&B id -> kind -> last step

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".tmp")
        new.write_text(json.dumps({"num_done": self.num_done, "marks": self.marks}))
        new.replace(self.path)


def _settings(wandb: Any, on_refused: Callable[[], None]) -> Any:
    """Nothing but the figures: no console, code, git, command line, user or packages; and no signal to this process.

    W&B copies `on_refused` deeply, which a function survives and the bound method of a lock does not.
    """
    return wandb.Settings(
        console="off",
        program="pillsnap",
        save_code=False,
        disable_code=True,
        disable_git=True,
        disable_job_creation=True,
        symlink=False,
        use_dot_wandb=False,
        init_timeout=INIT_TIMEOUT_S,
        finish_timeout=FINISH_TIMEOUT_S,
        finish_timeout_raises=True,
        stop_on_fatal_error=True,
        stop_fn=on_refused,
        x_disable_meta=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
        x_transaction_log_flush_interval=5,
    )


class _WatchedOutput(io.TextIOWrapper):
    """Standard error that notices the one message by which W&B tells that it will not upload any more."""

    def __init__(self, fd: int, on_fatal: Callable[[], object]) -> None:
        super().__init__(os.fdopen(os.dup(fd), "wb"), encoding="utf-8", errors="backslashreplace", line_buffering=True)
        self.on_fatal = on_fatal

    def write(self, text: str) -> int:
        if "Fatal error" in text:
            self.on_fatal()
        return super().write(text)


def numbered_events(run_dir: Path, stop: threading.Event) -> Iterator[tuple[int, dict[str, Any]]]:
    """The events of the log with their place in it, until `stop` is set and the rest is read."""
    follower = EventFollower(run_dir)
    index = 0
    while True:
        stopping = stop.is_set()
        events = follower.poll(max_bytes=1 << 20)
        for event in events:
            yield index, event
            index += 1
        if not events:
            if stopping:
                return
            stop.wait(0.5)


def wandb_id(run: dict[str, Any], task: str) -> str:
    """W&B refuses some characters in an id."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", f"{run['run_id']}-{task}")


if __name__ == "__main__":
    main()
