"""Checkpoints are complete or not found, with torn, changed or missing files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from pillsnap.runs.checkpoint import CheckpointError, Position, find_checkpoint, load_checkpoint, save_checkpoint

FILES = ("model.safetensors", "ema.safetensors", "trainer.pt", "meta.json")


def save(folder: Path, epoch: int, value: float, *, best: bool = False, keep: int = 2, epoch_step: int = 0) -> Path:
    weights = {"w": torch.full((4, 3), value), "n": torch.tensor(epoch)}
    return save_checkpoint(
        folder, Position(epoch, epoch_step, 10 * epoch + epoch_step), model=weights,
        ema={k: v + 1 for k, v in weights.items()},
        trainer={"optimizer": {"lr": value}}, meta={"elapsed_s": 5.0}, best=best, keep=keep,
    )  # fmt: skip


def test_round_trip(tmp_path: Path) -> None:
    save(tmp_path, 1, 0.25)
    found, damaged = find_checkpoint(tmp_path)
    assert found is not None
    assert damaged == []
    assert found.position == Position(1, 0, 10)
    assert found.meta["elapsed_s"] == 5.0
    assert torch.equal(found.weights("model")["w"], torch.full((4, 3), 0.25))
    assert torch.equal(found.weights("ema")["w"], torch.full((4, 3), 1.25))
    assert found.trainer_state() == {"optimizer": {"lr": 0.25}}


def test_empty_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path) == (None, [])


def test_pruning_keeps_the_last_and_the_best(tmp_path: Path) -> None:
    for epoch in range(1, 7):
        save(tmp_path, epoch, float(epoch), best=epoch == 2)
    kept = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert [name.split("-")[-1] for name in kept] == ["0002", "0005", "0006"]
    best, _ = find_checkpoint(tmp_path, "best")
    assert best is not None
    assert best.position.epoch == 2


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "gone"])
def test_damaged_file_is_named_and_the_previous_checkpoint_used(tmp_path: Path, name: str, damage: str) -> None:
    save(tmp_path, 1, 1.0)
    path = save(tmp_path, 2, 2.0) / name
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(bytes(data))
    elif damage == "cut":
        path.write_bytes(bytes(data[: len(data) // 2]))
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
    found, damaged = find_checkpoint(tmp_path)
    assert found is not None
    assert found.position.epoch == 1
    assert any(name in message for message in damaged)
    with pytest.raises(CheckpointError, match=name):
        load_checkpoint(path.parent)


@pytest.mark.parametrize("content", [b"", b"{", b'{"checkpoint": 7', b"[]"])
def test_torn_pointer_falls_back_to_the_newest_checkpoint(tmp_path: Path, content: bytes) -> None:
    save(tmp_path, 1, 1.0)
    save(tmp_path, 2, 2.0)
    (tmp_path / "last.json").write_bytes(content)
    found, damaged = find_checkpoint(tmp_path)
    assert found is not None
    assert found.position.epoch == 2
    assert "last.json" in damaged[0]


def test_interruption_at_every_call_of_a_save_leaves_a_complete_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call that touches the disk is the last one in turn."""

    class Death(BaseException):
        pass

    calls = {"left": 10**9}

    def dying(function: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if calls["left"] == 0:
                raise Death
            calls["left"] -= 1
            return function(*args, **kwargs)

        return wrapper

    for name in ("fsync", "rename", "replace", "open"):
        monkeypatch.setattr(os, name, dying(getattr(os, name)))
    monkeypatch.setattr(torch, "save", dying(torch.save))
    save(tmp_path, 1, 1.0, best=True)
    survived = 0
    for allowed in range(60):
        calls["left"] = allowed
        try:
            save(tmp_path, 2 + allowed, 2.0 + allowed, best=True)
            completed = True
        except Death:
            completed = False
        calls["left"] = 10**9
        found, _ = find_checkpoint(tmp_path)
        best, _ = find_checkpoint(tmp_path, "best")
        assert found is not None and best is not None, allowed
        assert float(found.weights("model")["w"][0, 0]) == found.position.epoch
        survived += 1
        if completed:
            break
    assert completed
    assert survived >= 12


def test_meta_is_readable_json(tmp_path: Path) -> None:
    meta = json.loads((save(tmp_path, 3, 1.0, epoch_step=4) / "meta.json").read_text())
    assert meta["position"] == {"epoch": 3, "epoch_step": 4, "global_step": 34}
    assert set(meta["files"]) == {"model.safetensors", "ema.safetensors", "trainer.pt"}
