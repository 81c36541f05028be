"""What cannot be read is not called missing or damaged, and a path is read and printed as it is."""

from __future__ import annotations

import io
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from pillsnap.checklist import Check, print_checks
from pillsnap.cli import app, main, terminal
from pillsnap.cluster import session
from pillsnap.config import load_settings
from pillsnap.errors import UserError
from pillsnap.evaluate.predict import list_photos
from pillsnap.evaluate.verify import exported_model_problem
from pillsnap.manifest.labels import read_label
from pillsnap.manifest.table import read_classes, read_manifest
from pillsnap.models.classifier import build_classifier, export_for_timm
from pillsnap.models.detector import build_detector, export_for_ultralytics, read_exported
from pillsnap.photos.trial import try_photos
from pillsnap.runs.checkpoint import Position, find_checkpoint, save_checkpoint
from pillsnap.runs.directory import open_run
from tests.conftest import OtherUser

ODD_NAMES = ("it's", "[b]x[-1]", "what?", "a?b=c#d%41", 'say "pill"', ":warning: 약")
GAINS = {"box_gain": 7.5, "cls_gain": 0.5, "dfl_gain": 1.5}


def save(folder: Path) -> Path:
    weights = {"w": torch.zeros(2)}
    return save_checkpoint(
        folder, Position(1, 0, 10), model=weights, ema=weights, trainer={}, meta={"elapsed_s": 1.0}, best=True, keep=2
    )


def test_weights_have_the_rights_of_other_files(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        path = save(tmp_path)
    finally:
        os.umask(before)
    assert {file.name: oct(stat.S_IMODE(file.stat().st_mode)) for file in path.iterdir()} == dict.fromkeys(
        ("model.safetensors", "ema.safetensors", "trainer.pt", "meta.json"), "0o644"
    )


@pytest.mark.parametrize("name", ["model.safetensors", "trainer.pt", "meta.json", "../last.json", "..", "."])
def test_checkpoint_of_another_user_is_not_damaged(other_user: OtherUser, name: str) -> None:
    path = save(other_user.folder / "detection")
    with other_user.reads(path / name), pytest.raises(PermissionError) as caught:
        find_checkpoint(other_user.folder / "detection")
    assert "Permission denied" in str(caught.value)
    found, damaged = find_checkpoint(other_user.folder / "detection")
    assert found is not None and damaged == []


def fails(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.output.splitlines() if line.strip()]
    return line


def test_manifest_of_another_user_is_not_to_be_built_again(other_user: OtherUser, toy_manifest: Path) -> None:
    shutil.copytree(toy_manifest.parent, other_user.folder / "m")
    read_manifest(other_user.folder / "m")  # loads pyarrow while this user may
    for name, read in (("manifest.parquet", read_manifest), ("classes.json", read_classes)):
        path = other_user.folder / "m" / name
        with other_user.reads(path), pytest.raises(PermissionError) as caught:
            read(path.parent)
        assert caught.value.filename == str(path)
    data = str(other_user.folder)
    with other_user.reads(other_user.folder / "m/manifest.parquet"):
        line = fails("manifest", "validate", f"{data}/m", "--data-root", data)
    assert line.startswith(f"pillsnap: {data}/m/manifest.parquet: Permission denied.")
    assert "build it" not in line


def test_predict_reads_its_models_before_ray_starts(
    other_user: OtherUser, toy_manifest: Path, toy_tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process of Ray that finds this out is killed with a trace."""

    def start() -> None:
        raise UserError("Ray starts.")

    monkeypatch.setattr(session, "ray_session", start)
    manifest = shutil.copytree(toy_manifest.parent, other_user.folder / "m")
    manifest.chmod(0o755)  # the source is private
    run, _ = open_run(other_user.folder / "run", load_settings("demo"), manifest, toy_tree)
    photo = shutil.copy(next(toy_tree.rglob("*.png")), other_user.folder)
    asked = ("predict", str(photo), "--run", str(run.run_dir))
    assert fails(*asked).startswith(f"pillsnap: {run.run_dir} has no complete checkpoint: train it first")
    path = save(run.checkpoint_dir("detection"))
    with other_user.reads(path / "meta.json"):
        assert fails(*asked).startswith(f"pillsnap: {path / 'meta.json'}: Permission denied.")
    output = CliRunner().invoke(app, list(asked)).output
    assert output.startswith(f"The classification task has no checkpoint in {run.run_dir}/checkpoints/classification.")
    assert output.endswith("pillsnap: Ray starts.\n")


def test_weights_of_another_user_are_not_missing(other_user: OtherUser) -> None:
    path = other_user.folder / "weights.pt"
    path.write_bytes(b"x")
    for build in (
        lambda: build_detector("yolo11n", str(path), **GAINS),
        lambda: build_classifier("resnet10t", str(path), num_classes=2, drop_rate=0.0),
    ):
        with pytest.raises(ValueError, match="damaged"):
            build()
        with other_user.reads(path), pytest.raises(PermissionError, match=r"weights\.pt"):
            build()


def test_exported_model_of_another_user_is_not_damaged(other_user: OtherUser) -> None:
    path = other_user.folder / "a_classification_best.pt"
    torch.save({"state_dict": {}, "codes": [], "model": "m"}, path)
    assert exported_model_problem(path, "classification") == ""
    with other_user.reads(path):
        problem = exported_model_problem(path, "classification")
    assert problem == f"{path} cannot be read (Permission denied): check its owner and permissions"


def test_photos_and_labels_of_another_user_have_their_reason(
    other_user: OtherUser,
) -> None:
    inner = other_user.folder / "inner"
    inner.mkdir()
    photo, label = inner / "a.png", inner / "a.json"
    photo.write_bytes(b"x")
    label.write_text("{}")
    with other_user.reads(inner), pytest.raises(PermissionError, match="inner"):
        list_photos([other_user.folder])
    with other_user.reads(label):
        assert read_label(str(label), "K-1").problem == "unreadable_file"
    with other_user.reads(photo):
        reason = "inner/a.png (unreadable_file: Permission denied)"
        assert try_photos(["inner/a.png"], str(other_user.folder)) == (1, [reason])
    load_settings("demo")  # loads modules while this user may
    with other_user.reads(other_user.folder):
        line = fails("train", "--preset", "demo", "--data-root", str(inner), "--run", "/none")
    assert "Permission denied" in line and "not a folder" not in line


@pytest.mark.parametrize("name", ODD_NAMES)
def test_models_under_odd_names_are_read(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    detector = build_detector("yolo11n", "random", **GAINS)
    path = folder / f"{name}_detection_best.pt"
    export_for_ultralytics(detector, path, {"image_size_px": 64, "batch_size": 2, "epochs": 1})
    assert exported_model_problem(path, "detection") == ""
    for read in (read_exported(path), build_detector("yolo11n", str(path), **GAINS)):
        assert torch.equal(read.state_dict()["model.0.conv.weight"], detector.state_dict()["model.0.conv.weight"])
    classifier = build_classifier("resnet10t", "random", num_classes=2, drop_rate=0.0)
    path = folder / f"{name}.pt"
    export_for_timm(classifier, path, model="resnet10t", codes=["a", "b"], image_size_px=64, crop_margin=0.1)
    read = build_classifier("resnet10t", str(path), num_classes=2, drop_rate=0.0)
    assert torch.equal(read.state_dict()["layer1.0.conv1.weight"], classifier.state_dict()["layer1.0.conv1.weight"])


@pytest.mark.parametrize("name", ODD_NAMES)
def test_manifest_under_odd_names_is_read(toy_manifest: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(toy_manifest.parent, tmp_path / name)
    assert len(read_manifest(tmp_path / name)) == 33


@pytest.mark.parametrize("name", [*ODD_NAMES, "[red]", "[/]", "x" * 300])
def test_path_is_printed_as_it_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(terminal, "console", Console(file=out, width=40))
    terminal.say(f"report: /runs/{name}/report.html")
    print_checks([Check("disk", False, f"/runs/{name}", "free it"), Check("n", True, "y")], terminal.console)
    assert out.getvalue() == f"report: /runs/{name}/report.html\nno disk /runs/{name}: free it\nok n    y\n"
    error = io.StringIO()
    monkeypatch.setattr(main.sys, "stderr", error)
    with pytest.raises(SystemExit):
        main._fail(f"/runs/{name} is gone")
    assert error.getvalue() == f"pillsnap: /runs/{name} is gone\n"
