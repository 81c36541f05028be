"""The command: help, completion, one-line errors, and the commands that need no training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

import pillsnap
from pillsnap.cli import app
from pillsnap.config import setting_fields
from pillsnap.manifest.table import read_manifest

runner = CliRunner()
WIDE = {"COLUMNS": "400", "TERMINAL_WIDTH": "400"}


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
    assert "--stage 1 to 4, --preset and --config" in fails("train", "--data-root", empty)
    assert "only one of" in fails("train", "--stage", "1", "--preset", "demo", "--data-root", empty)
    assert "stage1" in fails("train", "--preset", "stage7", "--data-root", empty)
    assert "classification.lrr" in fails("train", "--stage", "1", "--data-root", empty, "--set", "classification.lrr=1")
    assert "manifest" in fails("train", "--stage", "1", "--data-root", empty, "--run", str(tmp_path / "run"))
    assert "no AI Hub photos" in fails(
        "manifest", "build", "--stage", "1", "--data-root", empty, "--out", str(tmp_path)
    )
    starts = ("train", "--stage", "1", "--data-root", empty, "--run", str(tmp_path / "run"), "--from-run", empty)
    assert "one of --checkpoint and --from-run" in fails(*starts, "--checkpoint", empty)
    assert "has no trained model of detection" in fails(*starts)
    assert "give --as as well" in fails("plan", "--stage", "3", "--steps", empty)
    assert "H100, H200, A100, RTX 5080" in fails("plan", "--stage", "3", "--as", "GTX 970")
    assert "not a run" in fails("evaluate", "--run", empty)
    assert "not a run" in fails("predict", "--run", empty, __file__)
    assert "no photo or folder" in fails("predict", "--run", empty, str(tmp_path / "none.png"))
    assert "WIDTHxHEIGHT" in fails(
        "synth", "--out", empty, "--classes", "2", "--singles", "2", "--combinations", "0", "--frame", "big"
    )
    importing = ("manifest", "import", empty, "--out", str(tmp_path / "out"))
    assert "--names" in fails(*importing)
    assert "auto, yolo, coco" in fails(*importing, "--format", "pascal")
    assert "takes one folder" in fails(*importing, empty, "--names", "a")
    assert "--names and --group-by" in fails(*importing, "--format", "csv", "--names", "a")
    assert "no .csv file" in fails(*importing, "--format", "csv")
    assert not (tmp_path / "run").exists()


def test_wrong_usage_is_exit_code_2() -> None:
    assert runner.invoke(app, ["train", "--epochs", "many"]).exit_code == 2
    assert runner.invoke(app, ["no-such-verb"]).exit_code == 2


def commands(command: Any = None, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every command that is not a group, as (words, command)."""
    command = command or typer.main.get_command(app)
    for word, inner in getattr(command, "commands", {}).items():
        if hasattr(inner, "commands"):
            yield from commands(inner, f"{name}{word} ")
        else:
            yield f"{name}{word}", inner


def test_commands_are_listed_in_the_order_of_use() -> None:
    lines = runner.invoke(app, ["--help"], env=WIDE).output.partition("Commands")[2].splitlines()
    listed = [line.strip("│ ").split()[0] for line in lines if line.startswith("│")]
    assert listed == [
        "demo", "manifest", "prepare", "plan", "preflight", "train", "evaluate", "predict", "enrol", "export", "verify",
        "monitor", "logs", "synth", "config",
    ]  # fmt: skip
    assert {words.split()[0] for words, _ in commands()} == set(listed)


@pytest.mark.parametrize("words", [words for words, _ in commands()])
def test_help_shows_every_option_with_its_meaning_and_default(words: str) -> None:
    result = runner.invoke(app, [*words.split(), "--help"], env=WIDE)
    assert result.exit_code == 0
    lines = [line for line in result.output.splitlines() if line.startswith("│")]
    for parameter in dict(commands())[words].params:
        assert parameter.help, f"{words} {parameter.name} has no help"
        assert "[" not in parameter.help, "brackets are markup: they are not printed"
        (line,) = [line for line in lines if line.strip("│* ").split()[0].strip(".") == parameter.opts[0]]
        assert "[default: " in line or "[required]" in line, line


def test_version() -> None:
    result = runner.invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"pillsnap {pillsnap.__version__}\n")


def test_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "pillsnap.cli", "--version"], capture_output=True, text=True)
    assert done.stdout == f"pillsnap {pillsnap.__version__}\n"


def test_completion_prints_a_script_and_completes_words() -> None:
    command = str(Path(sys.executable).with_name("pillsnap"))

    def output(*arguments: str, **variables: str) -> str:
        environment = os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"} | variables
        return subprocess.run([command, *arguments], capture_output=True, text=True, env=environment).stdout

    assert "complete -o default -F _pillsnap_completion pillsnap" in output("--show-completion", "bash")

    def completed(words: str) -> list[str]:
        number = str(len(words.split(" ")) - 1)
        return output(_PILLSNAP_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=number).split()

    assert completed("pillsnap pre") == ["prepare", "preflight", "predict"]
    assert completed("pillsnap train --preset stage") == ["stage1", "stage2", "stage3", "stage4"]


def test_config_show_has_every_setting_with_value_source_and_meaning(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("extends: stage3\ntrain: {amp: off, log_every_steps: 5}\n")
    words = ["config", "show", "--config", str(mine), "--epochs", "3", "--set", "classification.lr=1e-4"]
    shown = runner.invoke(app, words, env=WIDE)
    assert shown.exit_code == 0
    lines = [line.rstrip() for line in shown.output.splitlines()]
    for line in (
        "name = mine  (mine.yaml)",
        "sampling.num_photos = 100000  (stage3.yaml)",
        "train.amp = off  (mine.yaml)",
        "detection.epochs = 3  (option)",
        "classification.lr = 0.0001  (--set)",
        "train.seed = 42  (default)",
        "evaluation.price_per_hour = null  (default)",
    ):
        assert line in lines
    assert lines[lines.index("train.log_every_steps = 5  (mine.yaml)") + 1] == "    Steps between two `step` events."
    assert "train: Settings of both tasks: hardware, precision, checkpoints, failures." in lines

    entries = json.loads(runner.invoke(app, [*words, "--json"]).output)
    assert entries["classification.lr"] == {
        "value": 1e-4,
        "source": "--set",
        "description": "Peak learning rate; if you scale the batch by k, scale it by sqrt(k).",
    }
    assert list(entries) == [field.key for field in setting_fields()]
    defaults = json.loads(runner.invoke(app, ["config", "show", "--json"]).output)
    assert {entry["source"] for entry in defaults.values()} == {"default"}


def test_wrong_configuration_file_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("extends: demo\ntrain: {sed: 1}\n")
    assert "There is no setting 'train.sed'" in fails("config", "show", "--config", str(file))
    file.write_text("extends: a.yaml\n")
    assert "circle: a.yaml -> a.yaml" in fails("train", "--config", str(file), "--data-root", str(tmp_path))


def test_configuration_file_names_the_run_and_its_settings_apply(tmp_path: Path) -> None:
    photos, file, out = tmp_path / "photos", tmp_path / "half.yaml", tmp_path / "out"
    sizes = ["--classes", "2", "--singles", "12", "--combinations", "0", "--frame", "122x160"]
    assert runner.invoke(app, ["synth", "--out", str(photos), *sizes]).exit_code == 0
    file.write_text("extends: demo\nsampling: {num_photos: 6}\n")
    words = ["manifest", "build", "--config", str(file), "--data-root", str(photos), "--out", str(out)]
    assert runner.invoke(app, words).exit_code == 0
    assert len(read_manifest(out)) == 6


def test_import_prints_what_it_found(tmp_path: Path) -> None:
    def photo(path: str, label: str | None) -> None:
        image, text = tmp_path / "yolo/images" / f"{path}.png", tmp_path / "yolo/labels" / f"{path}.txt"
        image.parent.mkdir(parents=True, exist_ok=True)
        text.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 48)).save(image)
        if label is not None:
            text.write_text(label)

    photo("train/a", "0 0.5 0.5 0.2 0.2\n1 0.2 0.2 0.2 0.2\n")
    photo("train/b", "0 0.5 0.5 0.2 0.2\n")
    photo("train/c", "")
    photo("train/d", None)
    photo("val/e", "1 0.5 0.5 0.2 0.2\n")
    photo("val/f", "2 0.5 0.5 0.2 0.2\n")
    photo("val/g", None)
    words = ["manifest", "import", str(tmp_path / "yolo"), "--names", "x,y,z", "--out", str(tmp_path / "out")]
    result = runner.invoke(app, words)
    assert result.exit_code == 0, result.output
    assert result.output.splitlines() == [
        "format: yolo (labels/train/a.txt)",
        "train: 3 photos, 3 pills (3 with a box), 2 classes",
        "val: 1 photos, 1 pills (1 with a box), 1 classes",
        f"left out or odd (listed in {tmp_path / 'out/import_report.json'}):",
        "  class_only_in_validation: 1, the first images/val/f.png (photos show a class without a training photo: left "
        "out)",
        "  classes_without_photo: 1, the first z (classes have no photo in the manifest)",
        "  empty_label_file: 1, the first labels/train/c.txt (label files without a row: their photos are kept as "
        "background)",
        "  no_label_file: 2, the first images/train/d.png (photos have no label: left out)",
        "warning: 3 of 7 photos are left out",
        "warning: all photos of 1 classes are left out: z",
        f"manifest: {tmp_path / 'out/manifest.parquet'}",
    ]
    (tmp_path / "out/manifest.parquet").unlink()
    refused = runner.invoke(app, [*words, "--strict"])
    assert refused.exit_code == 2
    assert "3 of 7 photos are left out; all photos of 1 classes are left out: z (--strict)" in refused.output
    assert not (tmp_path / "out/manifest.parquet").exists()
    assert (tmp_path / "out/import_report.json").exists()


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
