"""The command: mistakes are one line and exit code 2, and light verbs do what they say."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from pillsnap.cli.main import app

runner = CliRunner()


def fails(*arguments: str) -> str:
    result = runner.invoke(app, list(arguments))
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    lines = [line for line in result.output.splitlines() if line.strip()]
    assert len(lines) == 1, result.output
    assert lines[0].startswith("pillsnap: ")
    return lines[0]


def test_mistakes_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PILLSNAP_DATA_ROOT", raising=False)
    (tmp_path / "empty").mkdir()
    empty = str(tmp_path / "empty")
    assert "--data-root" in fails("train", "--stage", "3")
    assert "--data-root" in fails("manifest", "build", "--stage", "3")
    assert "not a folder" in fails("train", "--stage", "3", "--data-root", str(tmp_path / "none"))
    assert "--stage 1 to 4 or --preset" in fails("train", "--data-root", empty)
    assert "stage1" in fails("train", "--preset", "stage7", "--data-root", empty)
    assert "classification.lrr" in fails("train", "--stage", "1", "--data-root", empty, "--set", "classification.lrr=1")
    assert "manifest" in fails("train", "--stage", "1", "--data-root", empty, "--run", str(tmp_path / "run"))
    assert "no AI Hub photos" in fails(
        "manifest", "build", "--stage", "1", "--data-root", empty, "--out", str(tmp_path)
    )
    assert "not a run" in fails("evaluate", "--run", empty)
    assert "not a run" in fails("predict", "--run", empty, __file__)
    assert "no photo or folder" in fails("predict", "--run", empty, str(tmp_path / "none.png"))
    assert "WIDTHxHEIGHT" in fails(
        "synth", "--out", empty, "--classes", "2", "--singles", "2", "--combinations", "0", "--frame", "big"
    )
    importing = ("manifest", "import", empty, "--out", str(tmp_path / "out"))
    assert "--names" in fails(*importing)
    assert "yolo and csv" in fails(*importing, "--format", "coco")
    assert "takes one folder" in fails(*importing, empty, "--names", "a")
    assert "--names and --group-by" in fails(*importing, "--format", "csv", "--names", "a")
    assert "no .csv file" in fails(*importing, "--format", "csv")
    assert not (tmp_path / "run").exists()


def test_wrong_usage_is_exit_code_2() -> None:
    assert runner.invoke(app, ["train", "--epochs", "many"]).exit_code == 2
    assert runner.invoke(app, ["no-such-verb"]).exit_code == 2


def test_every_verb_has_help() -> None:
    for verb in (
        "demo",
        "synth",
        "train",
        "evaluate",
        "predict",
        "monitor",
        "logs",
        "preflight",
        "verify",
        "manifest build",
        "manifest import",
        "manifest validate",
    ):
        result = runner.invoke(app, [*verb.split(), "--help"])
        assert result.exit_code == 0
        assert "Usage" in result.output


def test_help_does_not_load_torch_or_ray() -> None:
    code = "import sys; from pillsnap.cli import app; print({'torch', 'ray', 'ultralytics', 'timm'} & set(sys.modules))"
    started = time.monotonic()
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "set()"
    assert time.monotonic() - started < 10


def test_synth_build_validate(tmp_path: Path) -> None:
    photos, run = tmp_path / "photos", tmp_path / "run"
    sizes = ["--classes", "3", "--singles", "18", "--combinations", "6", "--frame", "244x320"]
    assert runner.invoke(app, ["synth", "--out", str(photos), *sizes]).exit_code == 0
    built = runner.invoke(app, ["manifest", "build", "--preset", "demo", "--data-root", str(photos), "--out", str(run)])
    assert built.exit_code == 0, built.output
    assert pd.read_csv(run / "manifest_train.csv")["mapping_code"].nunique() == 3
    assert len(pd.read_csv(run / "manifest_train.csv")) + len(pd.read_csv(run / "manifest_val.csv")) == 24

    report = tmp_path / "audit.json"
    command = ["manifest", "validate", str(run), "--data-root", str(photos), "--json", str(report)]
    assert runner.invoke(app, command).exit_code == 0
    victim = next(photos.rglob("*_0_2_*.png"))
    victim.write_bytes(victim.read_bytes()[:100])
    result = runner.invoke(app, command)
    assert json.loads(report.read_text())["findings"]
    assert result.exit_code == 1, result.output
