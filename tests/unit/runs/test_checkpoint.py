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


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def test_second_save_at_a_position_counts_and_takes_the_place_of_the_first(tmp_path: Path) -> None:
    save(tmp_path, 1, 1.0)
    for value in (2.0, 2.5, 2.75):
        path = save(tmp_path, 2, value, epoch_step=4)
        found, damaged = find_checkpoint(tmp_path)
        assert found is not None and found.path == path and damaged == []
        assert float(found.weights("model")["w"][0, 0]) == value
    assert names(tmp_path) == ["step-00000010-epoch-0001", "step-00000024-3"]
    (tmp_path / "last.json").write_bytes(b"")  # without the pointer, the newest is still the last one saved
    found, _ = find_checkpoint(tmp_path)
    assert found is not None and found.path == path


def test_best_checkpoint_stays_when_its_position_is_saved_again(tmp_path: Path) -> None:
    save(tmp_path, 1, 1.0, best=True, keep=1)
    save(tmp_path, 1, 2.0, keep=1)
    found = [find_checkpoint(tmp_path, pointer)[0] for pointer in ("last", "best")]
    values = [float(each.weights("model")["w"][0, 0]) for each in found if each]
    assert values == [2.0, 1.0]


def test_damaged_checkpoint_is_saved_again_beside_sound_ones(tmp_path: Path) -> None:
    save(tmp_path, 1, 1.0)
    (save(tmp_path, 2, 2.0) / "trainer.pt").write_bytes(b"torn")
    save(tmp_path, 2, 2.5)
    found, damaged = find_checkpoint(tmp_path)
    assert found is not None and damaged == [] and float(found.weights("model")["w"][0, 0]) == 2.5
    assert names(tmp_path) == ["step-00000010-epoch-0001", "step-00000020-epoch-0002-2"]


def test_name_of_a_pointer_is_not_used_again(tmp_path: Path) -> None:
    """A node that takes over a remote run has its pointers, but not yet its checkpoints."""
    (tmp_path / "best.json").write_text('{"checkpoint": "step-00000010-epoch-0001"}')
    assert save(tmp_path, 1, 1.0).name == "step-00000010-epoch-0001-2"


def test_nothing_is_deleted_while_a_pointer_is_damaged(tmp_path: Path) -> None:
    save(tmp_path, 1, 1.0, best=True, keep=1)
    (tmp_path / "best.json").write_bytes(b"")
    for epoch in (2, 3):
        save(tmp_path, epoch, float(epoch), keep=1)
    assert len(names(tmp_path)) == 3
    save(tmp_path, 4, 4.0, best=True, keep=1)
    assert names(tmp_path) == ["step-00000040-epoch-0004"]


def test_save_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    (tmp_path / ".step-00000007.partial").mkdir()
    save(tmp_path, 1, 1.0)
    assert names(tmp_path) == ["step-00000010-epoch-0001"]


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
