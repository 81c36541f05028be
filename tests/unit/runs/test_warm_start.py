"""A run started from another run's checkpoint, and the cases that are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pillsnap.config import Settings, load_settings
from pillsnap.errors import UserError
from pillsnap.manifest.table import manifest_hash, read_classes
from pillsnap.runs.checkpoint import CheckpointError, Position, find_checkpoint, save_checkpoint
from pillsnap.runs.directory import Run, only_driver, open_run
from pillsnap.runs.warm_start import adopt_checkpoint, as_config, named_checkpoint

SETTINGS = load_settings("demo", {"train.task": "classification"})


def save(folder: Path, manifest: Path, epoch: int, best: bool) -> Path:
    weights = {"w": torch.full((3,), float(epoch))}
    meta = {
        "task": "classification", "manifest_hash": manifest_hash(manifest), "elapsed_s": 7.0,
        "config": SETTINGS.model_dump(mode="json"), "codes": [entry.code for entry in read_classes(manifest.parent)],
    }  # fmt: skip
    position = Position(epoch, 0, 10 * epoch)
    return save_checkpoint(
        folder, position, model=weights, ema=weights, trainer={"best": 0.5}, meta=meta, best=best, keep=3
    )


def begin(
    run_dir: Path, path: Path, manifest: Path, root: Path, settings: Settings = SETTINGS
) -> tuple[Run, list[str]]:
    start = named_checkpoint(path)
    run, notes = open_run(run_dir, settings, manifest, root, like=(str(start.path), as_config(start)))
    return run, [*notes, adopt_checkpoint(run, start)]


def test_run_continues_from_the_checkpoint_and_keeps_the_best(
    toy_manifest: Path, toy_tree: Path, tmp_path: Path
) -> None:
    source = tmp_path / "a" / "checkpoints" / "classification"
    save(source, toy_manifest, 1, best=True)
    path = save(source, toy_manifest, 2, best=False)
    changed = load_settings("demo", {"train.task": "classification", "classification.lr": 1e-4})
    run, notes = begin(tmp_path / "b", path / "meta.json", toy_manifest, toy_tree, changed)
    folder = run.checkpoint_dir("classification")
    assert find_checkpoint(folder)[0].position == Position(2, 0, 20)  # type: ignore[union-attr]
    assert find_checkpoint(folder, "best")[0].position == Position(1, 0, 10)  # type: ignore[union-attr]
    assert notes[0].startswith("classification.lr is now 0.0001")
    assert notes[-1] == f"classification continues from {path}, step 20"
    with pytest.raises(UserError, match="already holds step-00000020-epoch-0002"):
        begin(tmp_path / "b", source / "step-00000010-epoch-0001", toy_manifest, toy_tree, changed)


@pytest.mark.parametrize(
    "override, named",
    [({"classification.model": "resnet18"}, "classification.model was 'resnet10t' and is 'resnet18'"),
     ({"classification.batch_size": 64}, "classification.batch_size was 32 and is 64")],
)  # fmt: skip
def test_different_settings_are_refused_by_name(
    override: dict, named: str, toy_manifest: Path, toy_tree: Path, tmp_path: Path
) -> None:
    path = save(tmp_path / "a", toy_manifest, 1, best=True)
    other = load_settings("demo", {"train.task": "classification"} | override)
    with pytest.raises(UserError, match=named):
        begin(tmp_path / "b", path, toy_manifest, toy_tree, other)
    assert not (tmp_path / "b" / "config.json").exists()


def test_other_manifest_other_task_and_damage_are_refused(toy_manifest: Path, toy_tree: Path, tmp_path: Path) -> None:
    from pillsnap.manifest.build import build_manifest

    path = save(tmp_path / "a", toy_manifest, 1, best=True)
    other = build_manifest(toy_tree, tmp_path / "m", num_photos=20, num_classes=None, val_fraction=0.25, seed=1).path
    with pytest.raises(UserError, match="trained on another manifest"):
        begin(tmp_path / "b", path, other, toy_tree)
    with pytest.raises(UserError, match="which --task excludes"):
        adopt_checkpoint(
            open_run(tmp_path / "c", load_settings("demo", {"train.task": "detection"}), toy_manifest, toy_tree)[0],
            named_checkpoint(path),
        )
    with pytest.raises(UserError, match="is not a checkpoint"):
        named_checkpoint(tmp_path)
    (path / "trainer.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"trainer\.pt is damaged"):
        named_checkpoint(path)


def test_directory_in_use_and_missing_run_are_refused(toy_manifest: Path, toy_tree: Path, tmp_path: Path) -> None:
    open_run(tmp_path, SETTINGS, toy_manifest, toy_tree)
    with only_driver(tmp_path), pytest.raises(UserError, match=r"Process \d+ is training in"):
        open_run(tmp_path, SETTINGS, toy_manifest, toy_tree)
    with pytest.raises(UserError, match="holds no run that --resume could continue"):
        open_run(tmp_path / "new", SETTINGS, toy_manifest, toy_tree, resume=True)
