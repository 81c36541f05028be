"""Kills a process at each disk operation of a save: before it, after it, and with a file half written.

python -m tests.reliability.die_saving FOLDER prints one JSON line per kill. With the argument `again`, every save is of
one position and keeps one checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pillsnap.runs import checkpoint as module
from pillsnap.runs.checkpoint import Position, find_checkpoint, save_checkpoint


def save(folder: Path, epoch: int, best: bool = True, keep: int = 2, number: int = 1) -> None:
    weights = {"w": torch.full((64, 33), float(epoch)), "n": torch.tensor(epoch)}
    save_checkpoint(
        folder, Position(epoch, 0, 10 * epoch), model=weights, ema=weights,
        trainer={"optimizer": {"epoch": epoch}}, meta={"elapsed_s": 1.0, "number": number}, best=best, keep=keep,
    )  # fmt: skip


def die_at(boundary: int) -> None:
    """Send SIGKILL to this process at boundary number `boundary`."""
    import safetensors.torch

    passed = {"count": 0}

    def boundary_passed() -> None:
        if passed["count"] == boundary:
            os.kill(os.getpid(), signal.SIGKILL)
        passed["count"] += 1

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            boundary_passed()
            result = function(*args, **kwargs)
            boundary_passed()
            return result

        return wrapper

    def torn(function: Callable[..., Any], path_at: int) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            path = Path(args[path_at])
            whole = path.read_bytes()
            path.write_bytes(whole[: len(whole) // 2])  # as if only half were written
            boundary_passed()
            path.write_bytes(whole)
            return result

        return wrapper

    for name in ("fsync", "rename", "replace", "open", "mkdir", "close"):
        setattr(os, name, watched(getattr(os, name)))
    shutil.rmtree = watched(shutil.rmtree)
    torch.save = watched(torn(torch.save, 1))
    safetensors.torch.save_file = watched(torn(safetensors.torch.save_file, 1))
    module._hash = watched(module._hash)
    module._write_synced = watched(torn(module._write_synced, 0))
    module.json.loads = watched(json.loads)


def main(folder: Path, again: bool) -> None:
    torch.set_num_threads(1)
    if again:
        save(folder, 3, keep=1, number=-1)
    else:
        save(folder, 1)
        save(folder, 2)
        save(folder, 3, best=False)
    boundary, epoch = 0, 3 if again else 4
    while True:
        process = os.fork()
        if process == 0:
            die_at(boundary)
            save(folder, epoch, keep=1 if again else 2, number=boundary)
            os._exit(0)
        _, status = os.waitpid(process, 0)
        last, _ = find_checkpoint(folder)
        best, _ = find_checkpoint(folder, "best")
        whole = [
            c is not None
            and float(c.weights("model")["w"][0, 0]) == c.position.epoch == c.trainer_state()["optimizer"]["epoch"]
            for c in (last, best)
        ]
        found = [c.position.epoch if c else None for c in (last, best)]
        died = os.WIFSIGNALED(status)
        line = {"boundary": boundary, "died": died, "saving": epoch, "whole": all(whole), "found": found}
        numbers = [c.meta["number"] if c else None for c in (last, best)]
        print(json.dumps(line | {"numbers": numbers, "kept": len(list(folder.glob("step-*")))}))
        if not died:
            return
        # The next process saves the next epoch, as a restarted run would.
        boundary, epoch = boundary + 1, epoch if again else (found[0] or 0) + 1


if __name__ == "__main__":
    main(Path(sys.argv[1]), "again" in sys.argv)
