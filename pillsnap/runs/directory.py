"""The run directory: create, continue or load a run with its settings and manifest."""

from __future__ import annotations

import fcntl
import json
import os
import re
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from pillsnap.config import TASKS, Settings, settings_from_dict
from pillsnap.errors import UserError
from pillsnap.files import write_atomically, write_json
from pillsnap.manifest.table import (
    CLASSES_NAME,
    CSV_NAMES,
    PARQUET_NAME,
    ClassInfo,
    manifest_hash,
    read_classes,
    read_manifest,
)
from pillsnap.observe.events import read_events
from pillsnap.observe.run_state import RunState
from pillsnap.runs.enrolled import Enrolled, read_enrolled
from pillsnap.runs.extension import extend, way_out
from pillsnap.storage import is_uri, join, local_manifest

CONFIG_FILE = "config.json"
FOUND_BOXES_FILE = "found_boxes.json"
MEMORY_FILE = "memory.json"
"""Microbatch sizes by task."""
STOP_FILE = "stop-requested"
"""Its presence makes the training loop write a checkpoint and stop."""
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)?")
# Settings that may change when a run is continued: they do not affect what was trained before.
_MAY_CHANGE = ("train.num_workers", "train.cpus_per_worker", "train.device", "train.keep_checkpoints",
               "train.checkpoint_minutes", "train.storage", "train.max_failures", "train.hang_timeout_s",
               "train.log_every_steps", "train.task", "train.compile", "train.amp", "train.ema_warmup_steps",
               "train.patience", "train.time_budget_minutes", "detection.lr", "classification.lr", "detection.weights",
               "classification.weights")  # fmt: skip
_MAY_CHANGE_GROUPS = ("data.", "evaluation.", "targets.", "wandb.", "sampling.")


@dataclass(frozen=True)
class Run:
    """A run directory with its settings, manifest and classes."""

    run_dir: Path
    settings: Settings
    manifest: pa.Table
    manifest_hash: str
    classes: list[ClassInfo]
    data_root: str
    run_id: str
    uri: str = ""
    """URI of the run when it is kept in remote storage; `run_dir` is then this node's copy."""
    enrolled: Enrolled | None = None
    """Drugs enrolled after the training, whose classes are the last ones; see `with_enrolled`."""
    is_other_manifest: bool = False
    """Whether the manifest is not the one that was trained on."""

    def with_enrolled(self) -> Run:
        """This run with the classes of its enrolled drugs after the trained ones. Raises UserError for a damaged
        file of them.
        """
        enrolled = read_enrolled(self.run_dir)
        if enrolled is None:
            return self
        new = [replace(info, index=len(self.classes) + number) for number, info in enumerate(enrolled.classes)]
        return replace(self, classes=[*self.classes, *new], enrolled=enrolled)

    @property
    def where(self) -> str:
        """URI or folder of the run, valid on every node."""
        return self.uri or str(self.run_dir)

    def results_folder(self, split: str) -> str:
        """Folder of an evaluation's results under the run directory: "" for the run's own validation split."""
        other = [f"manifest-{self.manifest_hash[:8]}"] if self.is_other_manifest else []
        return "/".join(other + ([split] if split != "val" else []))

    @property
    def num_trained(self) -> int:
        """Number of classes that were trained; enrolled ones follow."""
        return len(self.classes) - (len(self.enrolled.classes) if self.enrolled else 0)

    @property
    def codes(self) -> list[str]:
        """Codes of the classes, ordered by the model's class index."""
        return [entry.code for entry in self.classes]

    def checkpoint_dir(self, task: str) -> Path:
        """Folder of a task's checkpoints."""
        return self.run_dir / "checkpoints" / task

    def export_path(self, task: str) -> Path:
        """File of a task's best model, for other programs."""
        return self.run_dir / "checkpoints" / f"{self.settings.name}_{task}_best.pt"


@contextmanager
def only_driver(run_dir: Path) -> Iterator[None]:
    """Hold this machine's lock on training in `run_dir`. Raises UserError when another process has it."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / ".driver.lock", "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise UserError(
                f"Process {lock.read().strip() or 'unknown'} is training in {run_dir}: wait for it, end it, or use "
                "another --run."
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def open_run(
    run_dir: Path,
    settings: Settings,
    manifest_path: str | Path,
    data_root: str | Path,
    *,
    resume: bool = False,
    like: tuple[str, dict[str, Any]] | None = None,
    uri: str = "",
) -> tuple[Run, list[str]]:
    """Create the run in `run_dir` or continue the one there. Also returns its changed settings, one line each.

    Raises UserError when the manifest, the classes or a setting that affects training differs, or when the run is
    finished and `resume` is not set: nothing is overwritten. `like` is the name and the configuration of a checkpoint
    that the run must match likewise. With `uri`, run and manifest are kept there and `run_dir` is this node's copy.
    """
    where = uri or str(run_dir)
    named = str(manifest_path) if is_uri(manifest_path) else str(Path(manifest_path).absolute())
    manifest_path = local_manifest(manifest_path)
    manifest = read_manifest(manifest_path)
    classes = read_classes(manifest_path if manifest_path.is_dir() else manifest_path.parent)
    config: dict[str, Any] = {
        "run_id": f"{settings.name}-{uuid.uuid4().hex[:8]}",
        "data_root": str(data_root),
        "manifest": join(uri, PARQUET_NAME) if uri else named,
        "manifest_hash": manifest_hash(manifest_path),
        "classes": [entry.to_dict() for entry in classes],
    }
    with only_driver(run_dir):
        path = run_dir / CONFIG_FILE
        before = _read_config(run_dir, where) if path.exists() else None
        given = settings
        for earlier in filter(None, (before, like[1] if like else None)):
            settings = _keep_cosine(earlier, settings)
        config["settings"] = settings.model_dump(mode="json")
        notes = _compare(*like, config) if like else []
        if resume and not before:
            raise UserError(f"{where} holds no run that --resume could continue: name one with --run.")
        if before:
            notes = _compare(where, before, config)
            notes += extend(where, settings_from_dict(before["settings"]), settings)
            config["run_id"] = before["run_id"]
            if not resume and not notes and _is_finished(run_dir, settings.tasks):
                raise UserError(
                    f"{where} holds a finished run: evaluate it with `pillsnap evaluate --run {where}`, "
                    "continue it with --resume, or train into another directory with --run."
                )
            if settings != given:
                notes.append("train.schedule stays 'cosine', with which the run began")
            notes.insert(0, f"continuing the run {before['run_id']} in {where}")
        if uri:
            _copy_manifest(manifest_path, run_dir)
        write_json(path, config)
    return _as_run(run_dir, config, manifest, uri), notes


def load_run(
    run_dir: Path, *, manifest_path: str | Path | None = None, data_root: str | Path | None = None, uri: str = ""
) -> Run:
    """Load an existing run, optionally with another manifest or data root for evaluation. With `uri` the run is kept
    there and `run_dir` is this node's copy.

    Anybody may have written it. Raises UserError when a model is not a plain name: a path would be opened.
    """
    config = _read_config(run_dir, uri or str(run_dir))
    trained_on = config["manifest_hash"]
    if manifest_path is not None:
        local = local_manifest(manifest_path)
        config |= {"manifest": str(manifest_path), "manifest_hash": manifest_hash(local)}
    elif is_uri(config["manifest"]) and (run_dir / PARQUET_NAME).is_file():
        local = run_dir / PARQUET_NAME  # published with the run
    else:
        local = local_manifest(config["manifest"])
    if data_root is not None:
        config["data_root"] = str(data_root)
    run = _as_run(run_dir, config, read_manifest(local), uri)
    run = replace(run, is_other_manifest=run.manifest_hash != trained_on)
    for task in TASKS:
        model = getattr(run.settings, task).model
        if not _PLAIN_NAME.fullmatch(model):
            raise UserError(
                f"{run.where} names the {task} model {model!r}: of a run, only the plain name of a model is accepted, "
                "such as yolo11m, never a file or an address. Evaluate it where it was trained, or name another --run."
            )
    return run


def _is_finished(run_dir: Path, tasks: Iterable[str]) -> bool:
    """Whether the log has the end of every task, and then the evaluation. That of an unfinished run does not count."""
    state = RunState()
    for event in read_events(run_dir):
        if event["kind"] in ("run", "task", "verdict"):
            state.apply(event)
    return state.verdict is not None and all(state.tasks[task].status in ("finished", "skipped") for task in tasks)


def _copy_manifest(path: Path, run_dir: Path) -> None:
    """Copy the manifest and its companions, so that the run can be evaluated and continued from any machine."""
    folder = path if path.is_dir() else path.parent
    parquet = folder / PARQUET_NAME if path.is_dir() else path
    others = (CLASSES_NAME, *CSV_NAMES.values())
    for source, name in ((parquet, PARQUET_NAME), *((folder / name, name) for name in others)):
        if source.is_file() and not (run_dir / name).exists():
            write_atomically(run_dir / name, source.read_bytes())


def _as_run(run_dir: Path, config: dict[str, Any], manifest: pa.Table, uri: str) -> Run:
    settings = settings_from_dict(config["settings"])
    try:
        classes = [ClassInfo(**entry) for entry in config["classes"]]
    except TypeError as error:
        raise UserError(f"{run_dir / CONFIG_FILE}: not a class map ({error}); name another run with --run.") from None
    return Run(
        run_dir, settings, manifest, config["manifest_hash"], classes, config["data_root"], config["run_id"], uri
    )


def _codes(config: dict[str, Any]) -> list[str]:
    return [entry["code"] for entry in config["classes"]]


def _read_config(run_dir: Path, where: str) -> dict[str, Any]:
    path = run_dir / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        missing = {"run_id", "data_root", "manifest", "manifest_hash", "classes", "settings"} - set(config)
    except FileNotFoundError:
        raise UserError(
            f"{where} is not a run: it has no {CONFIG_FILE}. Train it first, or name another with --run."
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); name another run with --run.") from None
    if missing:
        raise UserError(f"{path} lacks {', '.join(sorted(missing))}; name another run with --run.")
    return config


def _compare(name: str, before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Changed settings since `before`, the configuration of `name`, one line each. Raises UserError when one must not
    change.
    """
    if before["manifest_hash"] != now["manifest_hash"]:
        where = f"{before['manifest']}, " if "manifest" in before else ""
        raise UserError(
            f"{name} was trained on another manifest ({where}"
            f"sha256 {before['manifest_hash'][:12]}, not {now['manifest_hash'][:12]} as {now['manifest']}): "
            "give that one, or train into another directory with --run."
        )
    if _codes(before) != _codes(now):
        different = sorted({*_codes(before)} ^ {*_codes(now)})[:5]
        raise UserError(
            f"{name} has {len(before['classes'])} classes, which differ from the {len(now['classes'])} of "
            f"{now['manifest']} (only one of them has {', '.join(different) or 'this order'}): use another --run."
        )
    defaults = Settings(name=now["settings"]["name"]).model_dump(mode="json")  # an older run lacks later settings
    old, new = _flat(defaults) | _flat(before["settings"]), _flat(now["settings"])
    changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    may_change = {*_MAY_CHANGE}
    if old["train.schedule"] == new["train.schedule"] == "wsd" and "run_id" in before:
        may_change |= {f"{task}.epochs" for task in TASKS}  # see extension.py
    fatal = [key for key in changed if key not in may_change and not key.startswith(_MAY_CHANGE_GROUPS)]
    if fatal:
        listed = ", ".join(f"{key} was {old.get(key)!r} and is {new.get(key)!r}" for key in fatal[:5])
        way = "give the same ones, or use another --run"
        if all(key.endswith(".epochs") for key in fatal):  # on which the learning rates of all steps depend
            way = way_out(name, old["name"], [key.removesuffix(".epochs") for key in fatal])
        raise UserError(f"{name} was trained with other settings ({listed}): {way}.")
    return [f"{key} is now {new.get(key)!r} (it was {old.get(key)!r})" for key in changed]


def _keep_cosine(earlier: dict[str, Any], settings: Settings) -> Settings:
    """The settings, with the cosine if the `earlier` run began with it, as all did before presets had `wsd`."""
    if earlier["settings"].get("train", {}).get("schedule", "cosine") != "cosine":
        return settings
    train = {"schedule": "cosine", "patience": None, "time_budget_minutes": None}
    return settings.model_copy(update={"train": settings.train.model_copy(update=train)})


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
