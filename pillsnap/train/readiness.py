"""What can be known before the first step; `train` and `preflight` check it alike, so that a fault costs seconds."""

from __future__ import annotations

import importlib
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import torch

from pillsnap.checklist import Check
from pillsnap.cluster.session import rays_folder
from pillsnap.config import Settings
from pillsnap.data.samples import TaskSamples
from pillsnap.errors import UserError
from pillsnap.photos.trial import try_photos
from pillsnap.ray_compat.token import check_token
from pillsnap.tasks.base import Task
from pillsnap.tasks.registry import make_task

_SOCKET_BYTES = 107
_LEAST_FILE_BYTES = 1 << 30
_SOCKET = "ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
_EVALUATION = ("evaluator", "inference", "two_stage", "report.page", "report.gallery")
_NARROWEST_PX = 32
"""Stride of the deepest features: an input of this size leaves one value per channel and sample."""


def readiness_checks(
    settings: Settings, manifest: pa.Table, codes: list[str], data_root: str, begun: frozenset[str] = frozenset()
) -> list[Check]:
    """Every check of models, weights, samples, photos, the evaluation and Ray's folders. Tasks in `begun` have a
    checkpoint, which replaces their weights.
    """
    checks = [_checked("evaluation", _import_evaluation)]
    for name in settings.tasks:
        task = make_task(name, settings, codes)
        samples = cache(partial(task.samples, manifest, None))
        checks.append(_checked(f"{name} samples", partial(_count_samples, name, samples)))
        checks.append(_checked(f"{name} model", partial(_try_model, settings, codes, task, samples)))
        if checks[-1].ok and name not in begun:
            checks.append(_checked(f"{name} weights", partial(_load_weights, task)))
    for split in ("train", "val"):
        checks.append(_checked(f"{split} photos", partial(_read_photos, manifest, data_root, split)))
    if not os.environ.get("RAY_ADDRESS"):
        checks.append(_checked("Ray's folders", _try_ray_folders))
    return checks


def require_ready(checks: list[Check]) -> list[str]:
    """What is worth a line of the checks that passed. Raises UserError with those that failed."""
    failed = [f"{check.name}: {check.found}" for check in checks if check.ok is False]
    if failed:
        raise UserError(" ".join(failed))
    return [f"{check.name}: {check.found}" for check in checks if check.ok is None]


def _checked(name: str, work: Callable[[], Check | str]) -> Check:
    """The result of a check that returns what it found, or raises why it failed."""
    try:
        found = work()
    except (UserError, OSError) as error:
        return Check(name, False, str(error))
    except Exception as error:  # a library may raise anything for a model that does not fit
        return Check(name, False, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    return found if isinstance(found, Check) else Check(name, True, found)


def _import_evaluation() -> str:
    for module in _EVALUATION:
        try:
            importlib.import_module(f"pillsnap.evaluate.{module}")
        except Exception as error:  # a broken binary package raises whatever its loader raises
            raise UserError(f"cannot be imported ({error}): run `make install` again.") from error
    return "can be imported"


def _count_samples(name: str, samples: Callable[[], TaskSamples]) -> str:
    found = samples()
    require_train_samples(name, found)
    part = "" if found.num_val in (None, len(found.val)) else f" of {found.num_val:,}"
    return f"{len(found.train):,} to train, {len(found.val):,}{part} to validate"


def require_train_samples(name: str, samples: TaskSamples) -> None:
    """Raise UserError when task `name` has nothing to train on."""
    if not len(samples.train):
        raise UserError(
            f"The manifest has no photo that {name} can be trained on; check it with `pillsnap manifest validate`."
        )


def _try_model(settings: Settings, codes: list[str], task: Task, samples: Callable[[], TaskSamples]) -> str:
    """Build the model without memory and run it once, for the size of the input and for a batch of one."""
    own = task.settings
    untrained = make_task(task.name, settings, codes, untrained=True)
    with _same_random_numbers(), torch.device("cpu" if task.name == "detection" else "meta"):
        model = untrained.build().train()
        if task.name == "classification" or own.image_size_px == _NARROWEST_PX:
            images = torch.zeros(2, 3, own.image_size_px, own.image_size_px)
            model(images)
            size = _smallest_batch(settings, task, own.samples_per_epoch or len(samples().train))
            try:
                model(images[:size])
            except ValueError as error:  # "Expected more than 1 value per channel when training"
                raise UserError(
                    f"A step of {task.name} has one sample for a worker, of which {own.model} at {own.image_size_px} "
                    f"px cannot take batch statistics ({error}): change {task.name}.batch_size {own.batch_size} or "
                    "--num-workers."
                ) from None
    return f"{own.model}, {sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f} million parameters"


def _smallest_batch(settings: Settings, task: Task, samples_per_epoch: int) -> int:
    """1 when a worker's batch has one sample in some step, else 2. Batches of classification are padded."""
    workers = settings.train.num_workers if isinstance(settings.train.num_workers, int) else 1
    share = -(-task.settings.batch_size // workers)
    rest = samples_per_epoch % task.settings.batch_size
    shares = {share} if task.name == "classification" else {share, rest % share}
    return 1 if 1 in shares else 2


def _load_weights(task: Task) -> Check | str:
    notes: list[str] = []
    with _same_random_numbers():
        task.build(notes)
    name = f"{task.name} weights"
    return Check(name, None, " ".join(notes)) if notes else task.settings.weights


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield


def _read_photos(manifest: pa.Table, data_root: str, split: str) -> Check | str:
    """Some photos of a split may be bad, which training masks; when none can be read, they are not there."""
    paths = manifest.filter(pc.equal(manifest["split"], split))["location"].to_pylist()
    tried, problems = try_photos(paths, data_root)
    if problems and len(problems) == tried:
        raise UserError(f"none of {tried} tried under {data_root} can be read, the first {problems[0]}.")
    found = f"{tried - len(problems)} of {tried} tried can be read"
    return Check(f"{split} photos", None, f"{found}, not {problems[0]}") if problems else found


def _try_ray_folders() -> str:
    """Whether a local Ray can keep its sessions and its sockets, and has its token and its certificates."""
    base = rays_folder()
    length = len(os.fsencode(os.path.join(os.path.abspath(base), _SOCKET)))
    if length > _SOCKET_BYTES:
        raise UserError(
            f"The paths of Ray's sockets under {base} would have {length} bytes, of which {_SOCKET_BYTES} are allowed: "
            "set RAY_TMPDIR to a short folder, such as /tmp."
        )
    folder = next(path for path in (Path(base, "ray"), *Path(base, "ray").absolute().parents) if path.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        raise UserError(f"Ray cannot write its session to {folder}: set RAY_TMPDIR to a folder of yours.")
    largest = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if 0 <= largest < _LEAST_FILE_BYTES:  # -1: any
        raise UserError(f"A file may have at most {largest / 1e6:.1f} MB here, too little for Ray: raise `ulimit -f`.")
    check_token()
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        for name in ("RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT"):
            if not os.access(os.environ.get(name, ""), os.R_OK):
                raise UserError(
                    f"RAY_USE_TLS is set, and {name} names no file that can be read: set it, or unset RAY_USE_TLS."
                )
    return base
