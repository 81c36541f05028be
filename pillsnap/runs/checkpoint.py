"""Checkpoints on disk: write, commit, verify, find, prune.

    checkpoints/<task>/
        step-00001234/
            model.safetensors     weights and buffers as trained
            ema.safetensors       their moving average, which is evaluated and exported
            trainer.pt            optimizer, random state, position; loads with weights_only=True
            meta.json             config, class codes, manifest hash, versions, metrics, sha256 of itself and the files
        last.json                 names the last complete checkpoint
        best.json                 names the checkpoint with the best validation metric
        branch.json               names the last checkpoint from which the run can be extended to more epochs
        branch-best.json          names the best checkpoint at that time

`save_checkpoint` commits: it writes under a temporary name, syncs, hashes, renames, and moves the pointers last. It
replaces no checkpoint: one of the same position gets a new name, and the old one is deleted after the pointers moved. A
pointer therefore always names a complete checkpoint, whenever the process is killed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pillsnap.errors import UserError
from pillsnap.files import MISSING

if TYPE_CHECKING:  # Ray Train's dataset manager needs only positions: torch would delay each restart of the workers
    import torch

FORMAT = 1
CHECKPOINT_FILES = ("model.safetensors", "ema.safetensors", "trainer.pt")
META_FILE = "meta.json"
POINTERS = ("last", "best", "branch", "branch-best")
_NAME = re.compile(r"step-(\d+)(?:-epoch-(\d+))?(?:-(\d+))?")


class CheckpointError(UserError):
    """A checkpoint is missing, incomplete or damaged; the message names the file."""


@dataclass(frozen=True)
class Position:
    """Position of a task: epochs completed, training steps done in the current epoch, and optimizer steps in total."""

    epoch: int = 0
    epoch_step: int = 0
    global_step: int = 0


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    meta: dict[str, Any]

    @property
    def position(self) -> Position:
        return Position(**self.meta["position"])

    def weights(self, which: str = "ema") -> dict[str, torch.Tensor]:
        """State dict of the `model` or of its moving average `ema`. Raises CheckpointError when it is neither."""
        from safetensors.torch import load_file

        return _read(self.path / f"{which}.safetensors", load_file)

    def trainer_state(self) -> dict[str, Any]:
        """Optimizer, loss scale, random state and progress. Raises CheckpointError for anything that could run code."""
        import torch

        return _read(self.path / "trainer.pt", lambda path: torch.load(path, map_location="cpu", weights_only=True))


def copy_weights(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copy of a state dict on the host, each tensor contiguous as safetensors requires."""
    import torch

    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in weights.items()
    }


def copy_state(state: Any) -> Any:
    """Copy of nested dictionaries and lists with every tensor on the host, in its memory layout."""
    import torch

    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: copy_state(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(copy_state(value) for value in state)
    return state


def save_checkpoint(
    folder: Path,
    position: Position,
    *,
    model: Mapping[str, torch.Tensor],
    ema: Mapping[str, torch.Tensor],
    trainer: dict[str, Any],
    meta: dict[str, Any],
    best: bool,
    keep: int,
    branch: bool = False,
) -> Path:
    """Write and commit one checkpoint, move the pointers, and prune all but the last `keep` and those that pointers
    name. `branch`: the run can be extended from it. Returns its path. `model` and `ema` come from `copy_weights`.
    """
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    for abandoned in folder.glob(".step-*.partial"):
        shutil.rmtree(abandoned)
    final = folder / _new_name(folder, position)
    partial = folder / f".{final.name}.partial"
    try:
        partial.mkdir()
        torch.save(trainer, partial / "trainer.pt")
        for name, weights in (("model", model), ("ema", ema)):
            save_file(dict(weights), partial / f"{name}.safetensors")
            shutil.copymode(partial / "trainer.pt", partial / f"{name}.safetensors")  # safetensors ignores the umask
        hashes = {name: _hash(partial / name) for name in CHECKPOINT_FILES}
        for name in CHECKPOINT_FILES:
            _sync(partial / name)
        contents = {"format": FORMAT, "position": asdict(position), **meta, "files": hashes}
        _write_synced(partial / META_FILE, _dump(contents | {"sha256": _hash_of_meta(contents)}))
        _sync(partial)
    except Exception:
        shutil.rmtree(partial, ignore_errors=True)  # frees space on a full disk
        raise
    os.rename(partial, final)
    _sync(folder)
    for pointer, name in moved_pointers(folder, final.name, best=best, branch=branch).items():
        point_to(folder, pointer, name)
    _prune(folder, keep)
    return final


@contextmanager
def only_writer(folder: Path, patience_s: float = 60.0) -> Iterator[None]:
    """Hold the lock for writing checkpoints to `folder`. Raises UserError when another process holds it for longer than
    `patience_s`, which a killed worker does not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".writer.lock", "w") as lock:
        give_up_s = time.monotonic() + patience_s
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > give_up_s:
                    raise UserError(
                        f"Another process writes checkpoints to {folder}: end it, or train with another --run."
                    ) from None
                time.sleep(0.1)
        yield


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify one checkpoint. Raises CheckpointError naming the file that is missing or damaged, and OSError
    for one that is there and cannot be read.
    """
    try:
        meta = json.loads((path / META_FILE).read_text(encoding="utf-8"))
        files, recorded = dict(meta["files"]), meta.pop("sha256")
        Position(**meta["position"])
    except MISSING:
        raise CheckpointError(f"{path / META_FILE} is missing.") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / META_FILE} is damaged ({type(error).__name__}).") from None
    if recorded != _hash_of_meta(meta):
        raise CheckpointError(f"{path / META_FILE} is damaged: its sha256 is not the recorded one.")
    for name in CHECKPOINT_FILES:
        try:
            sound = _hash(path / name) == files.get(name)
        except MISSING:
            raise CheckpointError(f"{path / name} is missing.") from None
        if not sound:
            raise CheckpointError(f"{path / name} is damaged: its sha256 is not the recorded one.")
    return Checkpoint(path, meta)


def find_checkpoint(folder: Path, pointer: str = "last") -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint that a pointer (`last` or `best`) names, and one message per damaged file.

    When the pointer or its checkpoint is damaged, the newest sound one is used; None when there is none. Raises OSError
    for a file that is there and cannot be read: another user's run is not a damaged one.
    """
    names = sorted(_names(folder), key=age, reverse=True)
    try:
        pointed: str | None = (folder / f"{pointer}.json").read_text(encoding="utf-8")
    except FileNotFoundError:
        pointed = None
    except ValueError:
        pointed = ""
    return newest_sound(names, pointed, str(folder / f"{pointer}.json"), lambda name: load_checkpoint(folder / name))


def newest_sound(
    names: list[str], pointed: str | None, pointer_path: str, load: Callable[[str], Checkpoint]
) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint named by a pointer's content (None: no such file), else the first of `names` that loads, and one
    message per damaged file.
    """
    damaged: list[str] = []
    if pointed is None:
        if names:
            damaged.append(f"{pointer_path} is missing.")
    elif (named := pointed_by(pointed)) is None:
        damaged.append(f"{pointer_path} is damaged.")
    else:
        names = [named, *(name for name in names if name != named)]
    for name in names:
        try:
            return load(name), damaged
        except CheckpointError as error:
            damaged.append(str(error))
    return None, damaged


def is_checkpoint_name(name: str) -> bool:
    """Whether `save_checkpoint` gives such names."""
    return _NAME.fullmatch(name) is not None


def age(name: str) -> tuple[int, int, int]:
    """Sort key of checkpoint names: (global step, epoch, number of the save at this position)."""
    match = _NAME.fullmatch(name)
    assert match is not None, name
    step, epoch, number = match.groups()
    return int(step), int(epoch or -1), int(number or 1)


def outdated(names: Iterable[str], pointed: Collection[str | None], keep: int) -> list[str]:
    """The checkpoints to delete: all but the newest one of each of the last `keep` positions, and those that pointers
    name. `pointed` has None for a damaged pointer, which may name any: then there are none to delete.
    """
    if None in pointed:
        return []
    newest = {age(name)[:2]: name for name in sorted(names, key=age)}
    kept = {*[*newest.values()][-keep:], *pointed}
    return [name for name in names if name not in kept]


def moved_pointers(folder: Path, name: str, *, best: bool, branch: bool) -> dict[str, str]:
    """The pointers that the new checkpoint `name` moves, in this order, and the checkpoints that they name then."""
    moved = {"best": name} if best else {}
    if branch:
        file = folder / "best.json"
        at_best = name if best else pointed_by(file.read_bytes()) if file.exists() else None
        moved |= {"branch-best": at_best} if at_best else {}
        moved["branch"] = name
    return moved | {"last": name}


def point_to(folder: Path, pointer: str, name: str) -> None:
    """Atomically set a pointer to the checkpoint `name`."""
    partial = folder / f".{pointer}.json.partial"
    _write_synced(partial, json.dumps({"checkpoint": name}))
    os.replace(partial, folder / f"{pointer}.json")
    _sync(folder)


def return_to_branch(folder: Path) -> None:
    """Make the branch the last checkpoint and the best one of its time the best; delete all that no pointer names."""
    best, branch = (folder / f"{pointer}.json" for pointer in ("branch-best", "branch"))
    if best.exists():
        point_to(folder, "best", str(pointed_by(best.read_bytes())))
    else:
        (folder / "best.json").unlink(missing_ok=True)
    point_to(folder, "last", str(pointed_by(branch.read_bytes())))
    for name in {*_names(folder)} - _pointed(folder):
        shutil.rmtree(folder / name)


def _read(path: Path, load: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    try:
        return load(path)
    except Exception as error:  # the content may be anything: its sha256 shows only that nothing changed it since
        raise CheckpointError(f"{path} is refused: it holds no state of PillSnap ({type(error).__name__}).") from None


def pointed_by(content: str | bytes) -> str | None:
    """The checkpoint named by a pointer's content; None when that is damaged."""
    try:
        return str(json.loads(content)["checkpoint"])
    except (ValueError, KeyError, TypeError):
        return None


def _new_name(folder: Path, position: Position) -> str:
    """A name that no checkpoint of the folder has and no pointer names, newer than all others of the position."""
    name = f"step-{position.global_step:08d}"
    if position.epoch_step == 0 and position.epoch:
        name += f"-epoch-{position.epoch:04d}"
    used = filter(is_checkpoint_name, [*_names(folder), *filter(None, _pointed(folder))])
    number = max((age(other)[2] for other in used if age(other)[:2] == age(name)[:2]), default=0) + 1
    return name if number == 1 else f"{name}-{number}"


def _prune(folder: Path, keep: int) -> None:
    for name in outdated(_names(folder), _pointed(folder), keep):
        shutil.rmtree(folder / name)


def _names(folder: Path) -> list[str]:
    try:
        return [entry.name for entry in os.scandir(folder) if is_checkpoint_name(entry.name) and entry.is_dir()]
    except MISSING:
        return []


def _pointed(folder: Path) -> set[str | None]:
    """What the pointers name, None for a damaged one."""
    files = [folder / f"{pointer}.json" for pointer in POINTERS]
    return {pointed_by(file.read_bytes()) for file in files if file.exists()}


def _dump(contents: dict[str, Any]) -> str:
    return json.dumps(contents, ensure_ascii=False, indent=1)


def _hash_of_meta(contents: dict[str, Any]) -> str:
    return hashlib.sha256(_dump(contents).encode()).hexdigest()


def _write_synced(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
