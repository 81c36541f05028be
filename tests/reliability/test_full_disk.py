"""The disk fills up during a save: the previous checkpoint is intact, and the message says so."""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import signal
from pathlib import Path

import pytest

from pillsnap.errors import UserError
from pillsnap.runs import checkpoint as checkpoint_module
from pillsnap.runs.checkpoint import find_checkpoint
from tests.reliability.harness import LoopRun, say, tiny


def test_full_disk_at_every_file_of_a_save(
    toy_manifest: Path, toy_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny(classification__epochs=2)
    real_sync, real_write = checkpoint_module._sync, checkpoint_module._write_synced
    passed = 0
    for full in ("model.safetensors", "ema.safetensors", "trainer.pt", "meta.json"):
        run = LoopRun(tmp_path / full, "classification", settings, toy_manifest, toy_tree)
        run.train(stop_at=lambda polls: polls == 1)

        def sync(path: Path, full: str = full) -> None:
            if path.name == full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            real_sync(path)

        def write(path: Path, text: str, full: str = full) -> None:
            if path.name == full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            real_write(path, text)

        with monkeypatch.context() as patched:
            patched.setattr(checkpoint_module, "_sync", sync)
            patched.setattr(checkpoint_module, "_write_synced", write)
            with pytest.raises(UserError, match=r"No space left.*the one before is intact.*Free disk space"):
                run.train()
        last, damaged = find_checkpoint(run.folder)
        assert last is not None and damaged == [] and last.position.global_step == 1
        assert not list(run.folder.glob(".*.partial"))
        run.train()
        assert [event["epoch"] for event in run.events("epoch")] == [1, 2]
        passed += 1
    say(
        passed,
        4,
        "disk full at each file of a checkpoint: the one before intact, the message says so, later it goes on",
    )


def _train_with_little_room(run_dir: str, manifest: str, root: str, message: str) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    run = LoopRun(Path(run_dir), "classification", tiny(classification__epochs=2), Path(manifest), Path(root))
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))  # smaller than the model's file
    try:
        run.train()
    except UserError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        Path(message).write_text(str(error))


def test_file_size_limit_ends_the_run_with_one_error(toy_manifest: Path, toy_tree: Path, tmp_path: Path) -> None:
    run = LoopRun(tmp_path / "run", "classification", tiny(classification__epochs=2), toy_manifest, toy_tree)
    run.train(stop_at=lambda polls: polls == 1)
    message = tmp_path / "message"
    arguments = (str(run.run_dir), str(toy_manifest), str(toy_tree), str(message))
    child = multiprocessing.get_context("spawn").Process(target=_train_with_little_room, args=arguments)
    child.start()
    child.join()
    assert "could not be written" in message.read_text() and "the one before is intact" in message.read_text()
    last, damaged = find_checkpoint(run.folder)
    assert last is not None and damaged == [] and last.position.global_step == 1
