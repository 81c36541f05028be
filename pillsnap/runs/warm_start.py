"""Starts a run from another run's checkpoint (--checkpoint)."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from pillsnap.errors import UserError
from pillsnap.runs.checkpoint import META_FILE, Checkpoint, find_checkpoint, load_checkpoint, point_to
from pillsnap.runs.directory import Run
from pillsnap.runs.remote_checkpoints import PublishedCheckpoints, find_run_checkpoint
from pillsnap.storage import folder_of, is_uri, last_name


def named_checkpoint(where: str | Path) -> Checkpoint:
    """The checkpoint given by its folder, its URI, or a file in it. Raises UserError when it is missing or damaged."""
    if is_uri(where):
        return _remote_checkpoint(str(where).removesuffix(f"/{META_FILE}").rstrip("/"))
    path = Path(where)
    folder = path.parent if path.is_file() else path
    if not (folder / "meta.json").is_file():
        raise UserError(
            f"--checkpoint {path} is not a checkpoint: name a folder such as RUN/checkpoints/detection/step-00000120."
        )
    return load_checkpoint(folder.absolute())


def _remote_checkpoint(uri: str) -> Checkpoint:
    """This node's copy of a published checkpoint, and of the run's best one."""
    folder = folder_of(uri)
    if last_name(folder_of(folder)) != "checkpoints":
        raise UserError(
            f"--checkpoint {uri} is not a checkpoint: name one such as RUN/checkpoints/detection/step-00000120."
        )
    store = PublishedCheckpoints(folder_of(folder_of(folder)), last_name(folder), "reader")
    store.find("best")
    return store.fetch(last_name(uri))


def as_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Manifest hash, classes and settings of a checkpoint, in the form of a run's config.json."""
    meta = checkpoint.meta
    return {
        "manifest_hash": meta["manifest_hash"],
        "classes": [{"code": code} for code in meta["codes"]],
        "settings": meta["config"],
    }


def adopt_checkpoint(run: Run, checkpoint: Checkpoint) -> str:
    """Copy a checkpoint and its run's best one into a run without checkpoints of that task. Returns a message. Raises
    UserError when the run has another checkpoint or does not train that task.
    """
    task = str(checkpoint.meta["task"])
    if task not in run.settings.tasks:
        raise UserError(f"{checkpoint.path} is a checkpoint of {task}, which --task excludes.")
    folder = run.checkpoint_dir(task)
    last, _ = find_run_checkpoint(run.where, task, role="driver")
    message = f"{task} continues from {checkpoint.path}, step {checkpoint.position.global_step}"
    if last is not None:
        if last.path.resolve() == checkpoint.path.resolve():
            return message
        raise UserError(
            f"{run.where} already holds {last.path.name} of {task}, which is not overwritten: "
            f"continue there with --resume, or start from {checkpoint.path.name} in another --run."
        )
    best = checkpoint
    if (checkpoint.path.parent / "best.json").exists():
        found, _ = find_checkpoint(checkpoint.path.parent, "best")
        if found is not None and found.position.global_step <= checkpoint.position.global_step:
            best = found
    for source in {best.path, checkpoint.path}:
        _copy(source, folder / source.name)
    point_to(folder, "best", best.path.name)
    point_to(folder, "last", checkpoint.path.name)
    if run.uri:
        published = PublishedCheckpoints(run.uri, task, "driver")
        keep = run.settings.train.keep_checkpoints
        for source in dict.fromkeys((best.path, checkpoint.path)):  # `last` names the one published last
            published.publish(folder / source.name, best=source == best.path, keep=keep, before_pointers=lambda: None)
    return message


def _copy(source: Path, target: Path) -> None:
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    load_checkpoint(partial)
    os.rename(partial, target)
