"""A set-up that cannot work is refused before the first step, by train and by preflight with the same line."""

from __future__ import annotations

import importlib
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from typer.testing import CliRunner

from pillsnap.checklist import Check
from pillsnap.cli import app
from pillsnap.config import load_settings
from pillsnap.manifest.table import read_classes, read_manifest, write_manifest
from pillsnap.models.classifier import build_classifier, export_for_timm
from pillsnap.models.detector import build_detector, export_for_ultralytics
from pillsnap.train import driver
from pillsnap.train.readiness import readiness_checks

GAINS = {"box_gain": 7.5, "cls_gain": 0.5, "dfl_gain": 1.5}
Patch = pytest.MonkeyPatch


def small_classifier(path: Path, num_classes: int, model: str = "resnet10t") -> torch.nn.Module:
    classifier = build_classifier(model, "random", num_classes=num_classes, drop_rate=0.0)
    codes = [str(number) for number in range(num_classes)]
    export_for_timm(classifier, path, model=model, codes=codes, image_size_px=64, crop_margin=0.1)
    return classifier


def small_detector(path: Path, model: str = "yolo11n") -> torch.nn.Module:
    detector = build_detector(model, "random", **GAINS)
    export_for_ultralytics(detector, path, {"image_size_px": 64, "batch_size": 2, "epochs": 1})
    return detector


def foreign_classifier(folder: Path, patch: Patch) -> list[str]:
    small_classifier(folder / "c.pt", 4, "mobilenetv3_small_050")
    return [f"classification.weights={folder}/c.pt"]


def foreign_detector(folder: Path, patch: Patch) -> list[str]:
    small_detector(folder / "d.pt", "yolov8s")
    return [f"detection.weights={folder}/d.pt"]


def no_pages(folder: Path, patch: Patch) -> list[str]:
    real = importlib.import_module

    def broken(name: str, *rest: Any) -> Any:
        if name == "pillsnap.evaluate.report.page":
            raise ImportError("libxml2.so.2: cannot open shared object file")
        return real(name, *rest)

    patch.setattr(importlib, "import_module", broken)
    return []


def deep_folder(folder: Path, patch: Patch) -> list[str]:
    patch.setenv("RAY_TMPDIR", f"/tmp/{'x' * 60}")
    return []


def without_certificates(folder: Path, patch: Patch) -> list[str]:
    patch.setenv("RAY_USE_TLS", "1")
    return []


def small_files(folder: Path, patch: Patch) -> list[str]:
    patch.setattr(
        resource, "getrlimit", lambda which: (102_400, 102_400) if which == resource.RLIMIT_FSIZE else (-1, -1)
    )
    return []


def missing_token(folder: Path, patch: Patch) -> list[str]:
    patch.setenv("RAY_AUTH_TOKEN_PATH", str(folder / "none"))
    return []


def empty_token(folder: Path, patch: Patch) -> list[str]:
    (folder / "token").write_text("\n")
    patch.setenv("RAY_AUTH_TOKEN_PATH", str(folder / "token"))
    return []


def no_validation_photos(folder: Path, patch: Patch) -> list[str]:
    root = folder / "photos"
    for path in read_manifest(folder / "manifest").filter(pa.compute.field("split") == "val")["image_path"].to_pylist():
        (root / path).unlink()
    return []


def no_boxes(folder: Path, patch: Patch) -> list[str]:
    table = read_manifest(folder / "manifest").drop_columns(["location"])
    nulls = pa.array([[None] * len(codes) for codes in table["codes"].to_pylist()], table.schema.field("boxes").type)
    table = table.set_column(table.schema.get_field_index("boxes"), "boxes", nulls)
    write_manifest(table, folder / "manifest", read_classes(folder / "manifest"))
    return []


def setting(*assignments: str) -> Callable[[Path, Patch], list[str]]:
    return lambda folder, patch: list(assignments)


WRONG: dict[str, tuple[Callable[[Path, Patch], list[str]], str]] = {
    "classifier mistyped": (setting("classification.model=resnet10x"), "timm has no model 'resnet10x'"),
    "detector mistyped": (setting("detection.model=yolo11q"), "There is no detection model 'yolo11q'"),
    "no classification weights": (setting("classification.weights=/none/c.pt"), "'/none/c.pt' are not there"),
    "no detection weights": (setting("detection.weights=best.pt"), "'best.pt' are not there"),
    "weights of another classifier": (foreign_classifier, "it is damaged, or of another model"),
    "weights of another detector": (foreign_detector, "they are those of another model"),
    "image size that the model has not": (
        setting("classification.model=vit_tiny_patch16_224", "classification.image_size_px=256"), "Input height (256)",
    ),
    "a batch of one": (
        setting("classification.model=mobilenetv4_conv_small_035", "classification.batch_size=1"),
        "change classification.batch_size 1 or --num-workers",
    ),
    "evaluation not importable": (no_pages, "evaluation: cannot be imported (libxml2.so.2"),
    "no certificates": (without_certificates, "RAY_USE_TLS is set, and RAY_TLS_SERVER_CERT names no file that can be"),
    "files too small": (small_files, "at most 0.1 MB here, too little for Ray: raise `ulimit -f`"),
    "sockets too long": (deep_folder, "set RAY_TMPDIR to a short folder"),
    "no token where it is said to be": (missing_token, "is not there and cannot be made"),
    "token empty": (empty_token, "token is empty: delete it"),
    "no validation photos": (no_validation_photos, "val photos: none of 8 tried"),
    "no boxes": (no_boxes, "detection samples: The manifest has no photo"),
}  # fmt: skip


@pytest.fixture
def set_up(toy_tree: Path, toy_manifest: Path, tmp_path: Path, monkeypatch: Patch) -> Path:
    """Photos and a manifest to damage."""
    shutil.copytree(toy_tree, tmp_path / "photos", copy_function=os.link)
    shutil.copytree(toy_manifest.parent, tmp_path / "manifest")
    for name in ("RAY_TMPDIR", "TMPDIR", "RAY_AUTH_TOKEN", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(driver, "train_and_evaluate", lambda *_: pytest.fail("training began"))
    monkeypatch.setattr(
        "pillsnap.cluster.preflight._packages_check",
        lambda: Check("packages", True, ""),
    )
    return tmp_path


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_work_is_refused_at_second_zero(name: str, set_up: Path, monkeypatch: Patch) -> None:
    spoil, expected = WRONG[name]
    assignments = [word for text in spoil(set_up, monkeypatch) for word in ("--set", text)]
    words = ["--preset", "demo", "--data-root", str(set_up / "photos"), "--manifest", str(set_up / "manifest")]
    words += ["--run", str(set_up / "run"), *assignments]
    train = CliRunner().invoke(app, ["train", *words])
    (line,) = [line for line in train.output.splitlines() if line.strip()]
    assert (train.exit_code, line.startswith("pillsnap: ")) == (2, True), train.output
    assert expected in line
    preflight = CliRunner().invoke(app, ["preflight", *words])
    assert preflight.exit_code == 2
    assert [
        line for line in preflight.output.splitlines() if line.startswith("no ") and expected.split(": ", 1)[-1] in line
    ]


def test_a_set_up_that_works_passes(set_up: Path) -> None:
    manifest, codes = read_manifest(set_up / "manifest"), [c.code for c in read_classes(set_up / "manifest")]
    small_classifier(set_up / "c.pt", 7)
    weights = {"classification.weights": str(set_up / "c.pt"), "detection.weights": "/none.pt"}
    before = torch.random.get_rng_state()
    checks = readiness_checks(
        load_settings("demo", weights), manifest, codes, str(set_up / "photos"), frozenset({"detection"})
    )
    assert {check.name: check.ok for check in checks} == {
        "evaluation": True, "detection samples": True, "detection model": True, "classification samples": True,
        "classification model": True, "classification weights": None, "train photos": True, "val photos": True,
        "Ray's folders": True,
    }  # fmt: skip
    (note,) = [check.found for check in checks if check.ok is None]
    assert note == f"{set_up}/c.pt: the head for 7 classes is replaced by one for 4"
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("in_file, wanted", [(4, 4), (7, 4), (4, 1000), (1000, 4), (1000, 1000), (1, 2)])
def test_head_of_a_classifier_is_kept_or_named(in_file: int, wanted: int, tmp_path: Path) -> None:
    given = small_classifier(tmp_path / "c.pt", in_file).state_dict()
    notes: list[str] = []
    made = build_classifier("resnet10t", str(tmp_path / "c.pt"), num_classes=wanted, drop_rate=0.0, notes=notes)
    own = made.state_dict()
    assert len(own["fc.weight"]) == wanted
    same = [name for name in own if own[name].shape == given[name].shape and torch.equal(own[name], given[name])]
    left = [] if in_file == wanted else ["fc.weight", "fc.bias"]
    assert sorted({*own} - {*same}) == sorted(left)
    assert len(notes) == (in_file != wanted)
    assert "state_dict" not in made.pretrained_cfg


def test_classifier_weights_that_lack_a_tensor_are_refused(tmp_path: Path) -> None:
    given = small_classifier(tmp_path / "c.pt", 7).state_dict()
    del given["layer1.0.conv1.weight"]
    torch.save(given, tmp_path / "c.pt")
    with pytest.raises(ValueError, match=r"Missing key.*layer1\.0\.conv1\.weight"):
        build_classifier("resnet10t", str(tmp_path / "c.pt"), num_classes=4, drop_rate=0.0)


def test_detector_weights_that_fit_in_part_are_named(tmp_path: Path) -> None:
    model = small_detector(tmp_path / "whole.pt")
    model.model[0].conv.weight = torch.nn.Parameter(torch.zeros(8, 3, 3, 3))
    export_for_ultralytics(model, tmp_path / "part.pt", {"image_size_px": 64, "batch_size": 2, "epochs": 1})
    notes: list[str] = []
    build_detector("yolo11n", str(tmp_path / "whole.pt"), **GAINS, notes=notes)
    assert notes == []
    build_detector("yolo11n", str(tmp_path / "part.pt"), **GAINS, notes=notes)
    assert notes == [f"{tmp_path}/part.pt fits 498 of 499 tensors; new ones are model.0.conv.weight"]
