"""Starts a run from the best models of another run (--from-run)."""

from __future__ import annotations

import os
from typing import Any

import torch

from pillsnap.config import Settings
from pillsnap.errors import UserError
from pillsnap.models.class_head import weights_for_classes
from pillsnap.runs.checkpoint import Checkpoint, Position, copy_weights, save_checkpoint
from pillsnap.runs.directory import Run
from pillsnap.runs.remote_checkpoints import PublishedCheckpoints, find_run_checkpoint
from pillsnap.storage import is_uri, one_line
from pillsnap.tasks.registry import make_task
from pillsnap.train.trainer import checkpoint_meta

_LEAVE_OUT = "name another run, or leave --from-run out"


def best_checkpoints(source: str, where: str, settings: Settings) -> dict[str, Checkpoint]:
    """The best checkpoint of the run `source` for each task that the run `where` has yet to begin; both are paths or
    URIs. Raises UserError for one that is missing, damaged or of another architecture, and when both are one run.
    """
    if source == where or (not is_uri(source) and os.path.realpath(source) == os.path.realpath(where)):
        raise UserError(f"--from-run {source} is the run itself: name another one, or another --run.")
    found = {}
    for name in settings.tasks:
        begun, damaged = find_run_checkpoint(where, name, role="driver")
        if begun is not None or damaged:
            continue
        checkpoint, damaged = find_run_checkpoint(source, name, "best")
        if damaged:
            raise UserError(f"--from-run {source}: {damaged[0].removesuffix('.')}: {_LEAVE_OUT}.")
        if checkpoint is None:
            raise UserError(f"--from-run {source} has no trained model of {name}: {_LEAVE_OUT}.")
        trained, wanted = checkpoint.meta["config"][name]["model"], getattr(settings, name).model
        if trained != wanted:
            raise UserError(
                f"--from-run {source} has {trained} for {name}, and this run has {wanted}: "
                f"give --set {name}.model={trained}, or leave --from-run out."
            )
        found[name] = checkpoint
    return found


def start_from(run: Run, source: str, best: dict[str, Checkpoint]) -> list[str]:
    """Write a checkpoint of step 0 for each task of `best`, with the moving average of the best model as its weights:
    from then on the run does not need `source` any more. Returns a line per task of the run.
    """
    notes = []
    for name in run.settings.tasks:
        if name not in best:
            notes.append(f"{name} has begun: it continues from its own checkpoint, not from {source}")
            continue
        weights, facts = _weights(run, name, best[name])
        path = save_checkpoint(
            run.checkpoint_dir(name), Position(), model=weights, ema=weights, trainer={},
            meta=checkpoint_meta(run, name) | {"elapsed_s": 0.0, "metrics": {}, "from_run": {"source": source} | facts},
            best=False, keep=run.settings.train.keep_checkpoints,
        )  # fmt: skip
        if run.uri:
            published = PublishedCheckpoints(run.uri, name, "driver")
            published.publish(path, best=False, keep=1, before_pointers=lambda: None)
        heads = ""
        if name == "classification":
            heads = "; {classes_kept} classes keep their weights, {classes_new} are new, {classes_left} are left out"
        notes.append(f"{name} starts from {best[name].path}{heads.format(**facts)}")
    return notes


def _weights(run: Run, name: str, best: Checkpoint) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The weights for the run's model, and the fields of the event `initial_weights`."""
    facts: dict[str, Any] = {"checkpoint": best.path.name}
    with torch.random.fork_rng(devices=[]):
        model = make_task(name, run.settings, run.codes, untrained=True).build()
    weights = best.weights("ema")
    if name == "classification":
        trained, codes = best.meta["codes"], run.codes
        weights = weights_for_classes(model, weights, trained, codes, run.settings.train.seed)
        kept = len({*trained} & {*codes})
        facts |= {"classes_kept": kept, "classes_new": len(codes) - kept, "classes_left": len(trained) - kept}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(
            f"{best.path} does not fit {getattr(run.settings, name).model} ({one_line(error)[:160]}): {_LEAVE_OUT}."
        ) from None
    return copy_weights(model.state_dict()), facts
