"""The W&B run of one task, and the cursor of mirrored events; used by follower.py.

The W&B row number is the task's global step: step, epoch and validation of one position share a row, and sending a row
again does not duplicate it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pillsnap.observe.events import follow_events

INIT_TIMEOUT_S = 30.0
FINISH_TIMEOUT_S = 120.0
POLL_INTERVAL_S = 5.0
"""W&B uploads every 15 s; a shorter interval would only take CPU time from training."""
MIRRORED_KINDS = ("step", "epoch", "validation", "examples")
_STEP_FIELDS = ("loss", "lr", "images_per_s", "data_wait_fraction", "gpu_memory_bytes")
_EPOCH_FIELDS = ("loss", "images_per_s", "data_wait_fraction", "duration_s")
_NODE_FIELDS = ("cpu_fraction", "host_memory_used_bytes", "disk_free_bytes")
_GPU_FIELDS = ("utilization", "memory_used_bytes", "temperature_c", "power_w")


@dataclass
class Target:
    """Destination of mirrored runs. `mode` is online or offline; `group` None means the run id."""

    wandb: Any
    run_dir: Path
    project: str
    group: str | None
    mode: str
    on_refused: Callable[[], None]
    on_offline: Callable[[str], None]

    def open(self, run: dict[str, Any], job: str) -> Any:
        """Start or resume the W&B run of `job` (a task or `evaluation`); `run` is the run event. When the server
        refuses it, this and later runs are recorded offline, so that nothing is lost.
        """
        try:
            return self._init(run, job)
        except Exception as error:  # of a wrong key, a server that does not answer, or an unknown entity
            if self.mode != "online":
                raise
            self.mode = "offline"
            self.wandb.teardown()  # its service still holds the id of the refused run
            found = self._init(run, job)
            reason = " ".join(str(error).split()) or type(error).__name__
            key = os.environ.get("WANDB_API_KEY")
            reason = reason.replace(key, "***") if key else reason
            self.on_offline(f"Weights & Biases refused the run ({reason[:200]}): recorded offline, training continues")
            return found

    def _init(self, run: dict[str, Any], job: str) -> Any:
        return self.wandb.init(
            project=self.project,
            dir=str(self.run_dir.resolve()),
            id=wandb_id(run, job),
            name=f"{run['name']}-{job}",
            group=self.group or run["run_id"],
            job_type=job,
            tags=[f"stage{run['stage']}" if isinstance(run["stage"], int) else str(run["stage"] or "run"), job],
            config={**run["config"], **{key: run[key] for key in ("manifest_hash", "num_workers", "versions")}},
            mode=self.mode,
            resume="allow",
            reinit="create_new",
            allow_val_change=True,
            settings=_settings(self.wandb, self.on_refused),
        )

    def unsynced(self, id_: str) -> list[Path]:
        """Offline folders of the W&B run `id_` that were not uploaded, oldest first."""
        folders = sorted((self.run_dir / "wandb").glob(f"offline-run-????????_??????-{id_}*"))
        return [folder.resolve() for folder in folders if not list(folder.glob("*.wandb.synced"))]


class TaskRun:
    """The W&B run of one task; receives each event once, even if training or this process is killed and resumed."""

    def __init__(self, target: Target, cursor: Cursor, run: dict[str, Any], task: str) -> None:
        self.id = wandb_id(run, task)
        self.run_id, self.task = run["run_id"], task
        self.run_dir, self.cursor, self.wandb = target.run_dir, cursor, target.wandb
        self.uploads_checkpoints = run["config"].get("wandb", {}).get("upload_checkpoints", True)
        self.nodes: dict[str, Any] = {}  # node samples for the next row
        self.position = 0
        unsynced = target.unsynced(self.id)
        if target.mode == "offline" and unsynced:
            # A killed process may have lost accepted rows; the event log has all of them, so start over.
            for folder in unsynced:
                shutil.rmtree(folder)
            cursor.marks.pop(self.id, None)
        self.run = target.open(run, task)
        self.folder = Path(self.run.settings.sync_dir)
        self.row_number = self.run.starting_step
        self.run.define_metric("global_step", hidden=True)
        self.run.define_metric("*", step_metric="global_step")
        known = cursor.marks.get(self.id, {})
        if target.mode == "online":
            # The server knows which rows arrived, the cursor which kinds they contain.
            last_row = self.run.starting_step - 1
            known = {kind: min(step, last_row) for kind, step in known.items()} | {"step": last_row}
        self.marks: dict[str, int] = dict.fromkeys((*MIRRORED_KINDS, "artifact"), 0) | known

    def catch_up(self, end: int) -> None:
        """Mirror this task's events among the first `end` of the log."""
        stop = threading.Event()
        stop.set()
        run_id = ""
        for event in islice(follow_events(self.run_dir, stop), end):
            if event["kind"] == "run":
                run_id = event["run_id"]
            if run_id == self.run_id and event.get("task", self.task) == self.task:
                self.mirror(event)

    def mirror(self, event: dict[str, Any]) -> None:
        kind = event["kind"]
        if kind == "failure":
            alert_failure(self.run, event)
        elif kind == "system":
            self.nodes |= _node_metrics(event)
        elif kind == "task" and event["status"] == "finished":
            self._log_checkpoints()
        if kind not in MIRRORED_KINDS:
            return
        # Steps repeated after a restart have the same samples and metrics: keep the first ones.
        self.position = step = event.get("step", self.position)
        if step <= self.marks[kind]:
            return
        row = self._row(event)
        if kind == "step":
            row, self.nodes = row | self.nodes, {}
        if row:
            row |= {"global_step": step, "epoch": event["epoch"], "_timestamp": event["time"]}
            # W&B rejects earlier rows; reading `run.step` would query its service.
            self.row_number = max(step, self.row_number)
            self.run.log(row, step=self.row_number)
        if kind == "validation" and event["best"]:
            self.run.summary.update({f"best/{name}": value for name, value in row.items() if name.startswith("val/")})
            self.run.summary["best/epoch"] = event["epoch"]
        self.marks[kind] = step
        if kind != "step":
            self.cursor.marks[self.id] = self.marks
            self.cursor.save()

    def finish(self) -> None:
        self._log_checkpoints()  # of a stopped or failed task; a finished task has logged them
        self.run.finish()
        self.cursor.marks[self.id] = self.marks
        self.cursor.num_done = self.cursor.num_seen
        self.cursor.save()

    def _row(self, event: dict[str, Any]) -> dict[str, Any]:
        if event["kind"] == "step":
            row = {f"train/{name}": event[name] for name in _STEP_FIELDS}
            row |= {f"train/loss_{name}": value for name, value in event["losses"].items()}
        elif event["kind"] == "epoch":
            row = {f"epoch/{name}": event[name] for name in _EPOCH_FIELDS}
        elif event["kind"] == "validation":
            row = {f"val/{name}": value for name, value in event["metrics"].items()}
        else:
            picture = self.run_dir / event["path"]
            caption = f"{self.task}, epoch {event['epoch']}"
            row = {"examples": self.wandb.Image(str(picture), caption=caption)} if picture.exists() else {}
        return {name: value for name, value in row.items() if value is not None}

    def _log_checkpoints(self) -> None:
        """Log the checkpoints named by `best.json` and `last.json` as versions of one artifact, without copying."""
        folder = self.run_dir / "checkpoints" / self.task
        named = {alias: _named_checkpoint(folder, file) for alias, file in (("best", "best"), ("latest", "last"))}
        latest = named["latest"]
        if not self.uploads_checkpoints or latest is None or self.marks["artifact"] >= self.position:
            return
        for path in dict.fromkeys(path for path in (named["best"], latest) if path is not None):
            artifact = self.wandb.Artifact(re.sub(r"[^A-Za-z0-9_.-]", "_", f"{self.id}-checkpoint"), type="model")
            artifact.add_dir(str(path), policy="immutable", skip_cache=True)
            aliases = [alias for alias, each in named.items() if each == path]
            self.run.log_artifact(artifact, aliases=[*aliases, path.name])
        self.marks["artifact"] = self.position


def alert_failure(run: Any, event: dict[str, Any]) -> None:
    """Send a W&B alert about the failure."""
    run.alert("Run failed", f"{event['message']} {event['cause']} {event['advice']}".strip(), level="ERROR")


def _named_checkpoint(folder: Path, pointer: str) -> Path | None:
    try:
        path = folder / str(json.loads((folder / f"{pointer}.json").read_text(encoding="utf-8"))["checkpoint"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return path if path.is_dir() else None


def _node_metrics(event: dict[str, Any]) -> dict[str, Any]:
    """Telemetry of a node as `nodes/<name>/cpu_fraction`, `nodes/<name>/gpu0/power_w`, …"""
    node = "nodes/" + re.sub(r"[^A-Za-z0-9_-]", "_", event["node"])
    metrics = {f"{node}/{name}": event[name] for name in _NODE_FIELDS}
    for gpu in event["gpus"]:
        metrics |= {f"{node}/gpu{gpu.get('index')}/{name}": gpu.get(name) for name in _GPU_FIELDS}
    return {name: value for name, value in metrics.items() if value is not None}


class Cursor:
    """Events mirrored so far, kept in a file for resumed runs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        data: dict[str, Any] = {}
        if path.exists():
            with contextlib.suppress(ValueError):
                data = json.loads(path.read_text())
        self.num_done: int = data.get("num_done", 0)  # number of events in finished W&B runs
        self.num_seen = self.num_done
        self.marks: dict[str, dict[str, int]] = data.get("marks", {})  # W&B id -> kind -> last step

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".tmp")
        new.write_text(json.dumps({"num_done": self.num_done, "marks": self.marks}))
        new.replace(self.path)


def _settings(wandb: Any, on_refused: Callable[[], None]) -> Any:
    """Only metrics are sent: no console output, code, git state, command line, user or packages."""
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
        x_disable_stats=True,  # the event log has the telemetry of every node
        x_save_requirements=False,
        x_transaction_log_flush_interval=5,
    )


def wandb_id(run: dict[str, Any], task: str) -> str:
    """Id of the W&B run, without characters that W&B rejects."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", f"{run['run_id']}-{task}")
