"""A run, weights, a configuration or a settings file of somebody else never runs code, whichever command opens it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import typer

from pillsnap.cli.main import app
from pillsnap.data.store.shards import ShardStore
from pillsnap.errors import UserError
from pillsnap.evaluate.verify import exported_problems, verify_run
from pillsnap.manifest.table import read_manifest
from pillsnap.models.classifier import build_classifier
from pillsnap.models.detector import build_detector, export_for_ultralytics, read_exported
from pillsnap.runs.checkpoint import CheckpointError, find_checkpoint
from pillsnap.runs.directory import load_run
from pillsnap.tasks.best_model import load_best
from tests.conftest import ROOT
from tests.security import attacks
from tests.security.attacks import PICKLES, Attack, foreign_run, succeeded

GAINS = {"box_gain": 7.5, "cls_gain": 0.5, "dfl_gain": 1.5}
TASKS = ("detection", "classification")


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """Where a successful attack leaves its mark."""
    return tmp_path / "ran"


def pillsnap(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    """Exit code and lines of standard error of a command."""
    try:
        app(list(arguments), standalone_mode=False)
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except typer.Exit as stop:
        code = stop.exit_code
    return code, capsys.readouterr().err.splitlines()


def test_the_attacks_work_where_nothing_guards_against_them(tmp_path: Path, ran: Path) -> None:
    """Otherwise none of the other tests would show anything."""
    for kind in PICKLES:
        path = attacks.pickles(tmp_path / "file", Attack(ran, kind.replace(" ", "-")), kind)
        if kind.startswith("torch"):
            torch.load(path, weights_only=False)
        elif kind == "numpy":
            np.load(path, allow_pickle=True)["params"]
        else:
            import pickle

            pickle.loads(path.read_bytes())
    path = attacks.model_file(tmp_path / "yolo11n.yaml", Attack(ran, "activation"))
    script = f"from ultralytics.nn.tasks import DetectionModel; DetectionModel({str(path)!r}, verbose=False)"
    unguarded = {name: value for name, value in os.environ.items() if name != "ULTRALYTICS_SAFE_LOAD"}
    subprocess.run([sys.executable, "-c", script], env=unguarded, check=True, capture_output=True, timeout=120)
    assert succeeded(ran) == ["activation", "numpy", "pickle", "torch", "torch,-old-format"]


@pytest.mark.parametrize("kind", PICKLES)
def test_models_and_checkpoints_of_a_run(kind: str, tmp_path: Path, ran: Path) -> None:
    """Each file is refused in one line by what `evaluate`, `verify`, `predict`, `export` and `train` read it with."""
    run_dir = foreign_run(tmp_path / "foreign")
    for task in TASKS:
        attacks.pickles(run_dir / f"checkpoints/demo_{task}_best.pt", Attack(ran, f"{task}-best"), kind)
        step = run_dir / "checkpoints" / task / "step-00000002"
        for name in ("trainer.pt", "model.safetensors", "ema.safetensors"):
            attacks.pickles(step / name, Attack(ran, f"{task}-{name}"), kind)
        attacks.resealed(step)
    run = load_run(run_dir)
    checks = {check.name: check for check in verify_run(run)}
    refused = [checks[f"{task}: best model"].found for task in TASKS] + exported_problems(run)
    assert len(refused) == 4
    for task in TASKS:
        checkpoint, _ = find_checkpoint(run.checkpoint_dir(task))
        assert checkpoint is not None
        for read in (checkpoint.trainer_state, checkpoint.weights, lambda c=checkpoint: c.weights("model")):
            with pytest.raises(CheckpointError) as error:
                read()
            refused.append(str(error.value))
        with pytest.raises(UserError) as unusable:
            load_best(run_dir, task, run.settings, run.codes)
        refused.append(str(unusable.value))
    assert all(line and "\n" not in line for line in refused)
    assert succeeded(ran) == []


@pytest.mark.parametrize("kind", PICKLES)
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".npz", ".safetensors", ".bin"])
def test_weights(kind: str, suffix: str, tmp_path: Path, ran: Path) -> None:
    path = attacks.pickles(tmp_path / f"weights{suffix}", Attack(ran, "weights"), kind)
    with pytest.raises(UserError, match="cannot be loaded") as detector:
        build_detector("yolo11n", str(path), **GAINS)
    with pytest.raises(UserError, match="cannot be loaded") as classifier:
        build_classifier("test_efficientnet", str(path), num_classes=3, drop_rate=0.0)
    assert "\n" not in f"{detector.value}{classifier.value}"
    assert succeeded(ran) == []


def test_weights_in_the_working_directory_are_not_those_of_the_hub(
    tmp_path: Path, ran: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither are those that a settings file of ultralytics points to."""
    for place in ("yolo11n.pt", "weights/yolo11n.pt"):
        attacks.pickles(tmp_path / place, Attack(ran, "weights"), "torch")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PILLSNAP_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(
        "ultralytics.utils.downloads.safe_download", lambda **options: (_ for _ in ()).throw(ConnectionError("offline"))
    )
    with pytest.raises(UserError, match="offline"):
        build_detector("yolo11n", "pretrained", **GAINS)
    assert succeeded(ran) == []


def test_fetched_weights_that_were_not_published_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PILLSNAP_CACHE_DIR", str(tmp_path / "cache"))

    def download(url: str, file: Path, **_: object) -> None:
        assert url.endswith("/v8.4.0/yolo11n.pt")
        Path(file).write_bytes(b"something else")

    monkeypatch.setattr("ultralytics.utils.downloads.safe_download", download)
    with pytest.raises(UserError, match=r"^The detection weights yolo11n\.pt are not those that ultralytics published"):
        build_detector("yolo11n", "pretrained", **GAINS)
    assert list((tmp_path / "cache/weights").iterdir()) == []


@pytest.mark.parametrize("make", [attacks.model_file, attacks.calling_model_file])
def test_model_files(make: object, tmp_path: Path, ran: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name is that of a model which ultralytics ships, whatever the working directory has; a file only data."""
    path = make(tmp_path / "yolo11n.yaml", Attack(ran, "model"))  # type: ignore[operator]
    monkeypatch.chdir(tmp_path)
    build_detector("yolo11n", "random", **GAINS)
    script = (
        "from pillsnap.models.detector import build_detector\n"
        f"build_detector({str(path)!r}, 'random', box_gain=1, cls_gain=1, dfl_gain=1)\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"pillsnap.errors.UserError: The detection model '{path}' cannot be built (TypeError: ")
    assert succeeded(ran) == []


@pytest.mark.parametrize(
    ("setting", "value"),
    [("detection__model", "./evil.yaml"), ("detection__model", "/tmp/evil.yaml"), ("detection__model", "../evil"),
     ("detection__model", "https://example.org/evil.yaml"), ("detection__model", "ul://evil/evil"),
     ("classification__model", "hf-hub:evil/evil"), ("classification__model", "local-dir:/tmp/evil")],
)  # fmt: skip
@pytest.mark.parametrize("command", ["evaluate", "verify", "predict", "export"])
def test_models_that_a_run_names(
    command: str, setting: str, value: str, tmp_path: Path, ran: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run_dir = foreign_run(tmp_path / "foreign", **{setting: value})
    for name in ("evil.yaml", "../evil.yaml"):
        attacks.model_file(run_dir / name, Attack(ran, "model"))
    monkeypatch.chdir(run_dir)
    photos = [str(next((tmp_path / "foreign").rglob("*.jpg")))] if command == "predict" else []
    code, lines = pillsnap(command, *photos, "--run", str(run_dir), capsys=capsys)
    assert code == 2 and len(lines) == 1 and "only the plain name of a model is accepted" in lines[0]
    assert succeeded(ran) == []


def test_columns_that_ray_data_unpickles(tmp_path: Path, ran: Path) -> None:
    import ray.data  # noqa: F401  (registers the type)

    run_dir = foreign_run(tmp_path / "foreign")
    attacks.pickled_columns(tmp_path / "foreign/manifest/manifest.parquet", Attack(ran, "manifest"))
    with pytest.raises(UserError, match="manifest"):
        read_manifest(load_run(run_dir).run_dir.parent / "manifest").to_pylist()
    for path in (run_dir / "store").rglob("*.arrow"):
        attacks.pickled_columns(path, Attack(ran, "store"))
        with pytest.raises(UserError, match="damaged"):
            ShardStore(str(path.parent)).find(np.array([1], np.uint64))
    assert succeeded(ran) == []


def test_configuration_files(tmp_path: Path, ran: Path, capsys: pytest.CaptureFixture[str]) -> None:
    attack = Attack(ran, "yaml")
    for text in (f"!!python/object/apply:os.system ['{attack.shell}']", "name: !!python/name:os.system"):
        (tmp_path / "theirs.yaml").write_text(text)
        code, lines = pillsnap("config", "show", "--config", str(tmp_path / "theirs.yaml"), capsys=capsys)
        assert code == 2 and len(lines) == 1 and "not valid YAML" in lines[0]
    assert succeeded(ran) == []


def test_modules_in_a_run_that_is_the_working_directory(tmp_path: Path, ran: Path) -> None:
    """`cd RUN && pillsnap ...`: neither the command, its child processes nor Ray's workers import from there."""
    run_dir = foreign_run(tmp_path / "foreign")
    for name in ("timm", "torch", "ray", "wandb", "yaml", "sitecustomize", "multiprocessing", "pillsnap", "cv2"):
        (run_dir / f"{name}.py").write_text(Attack(ran, name).python)
    script = tmp_path / "bin" / "pillsnap"  # as installed: its own folder is on the import path, not the working one
    script.parent.mkdir()
    script.write_text(
        "if __name__ == '__main__':\n"
        "    import multiprocessing, subprocess, sys\n"
        "    from pillsnap.cli import app\n"
        "    app(['config', 'show', '--preset', 'demo'], standalone_mode=False)\n"
        "    subprocess.run([sys.executable, '-m', 'pillsnap.tracking.follower', '{}'])\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(pool.apply(sum, ((1, 2, 39),)))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=run_dir, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.splitlines()[-1] == "42", done.stderr[-2000:]
    assert succeeded(ran) == []


@pytest.mark.parametrize("ray_api", ["", "public"])
def test_modules_in_the_working_directory_are_not_those_of_rays_workers(
    ray_api: str, tmp_path: Path, ran: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "timm.py").write_text(Attack(ran, "timm").python)
    script = tmp_path / "script.py"
    script.write_text(
        "from pillsnap.cluster.session import ray_session\n"
        "with ray_session():\n"
        "    import ray\n"
        "    ray.get(ray.remote(num_cpus=0)(lambda: __import__('timm').__version__).remote())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PILLSNAP_RAY": ray_api}
    subprocess.run([sys.executable, str(script)], cwd=tmp_path / "run", env=environment, check=True, timeout=300)
    assert succeeded(ran) == []


def test_our_own_export_is_read(tmp_path: Path) -> None:
    for name in ("yolo11n", "yolo26n"):
        detector = build_detector(name, "random", **GAINS)
        export_for_ultralytics(detector, tmp_path / "own.pt", {"image_size_px": 96, "batch_size": 4, "epochs": 1})
        read = read_exported(tmp_path / "own.pt").state_dict()
        assert all(torch.equal(read[key], value) for key, value in detector.state_dict().items())
        build_detector(name, str(tmp_path / "own.pt"), **GAINS)


def test_a_settings_file_of_ultralytics_in_the_temporary_folder(tmp_path: Path, ran: Path) -> None:
    """Another user may create any folder there first, with weights of theirs."""
    attacks.pickles(tmp_path / "theirs" / "yolo11n.pt", Attack(ran, "weights"), "torch")
    for folder in (f"pillsnap-ultralytics-{os.getuid()}/Ultralytics", f"Ultralytics-{os.getuid()}"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "settings.json").write_text(json.dumps({"weights_dir": str(tmp_path / "theirs")}))
    script = (
        "from pillsnap.models.detector import build_detector\n"
        "build_detector('yolo11n', 'pretrained', box_gain=1, cls_gain=1, dfl_gain=1)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "YOLO_CONFIG_DIR"}
    environment |= {"TMPDIR": str(tmp_path), "HOME": "/nonexistent", "YOLO_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert "UserError: The detection weights 'yolo11n.pt' cannot be loaded" in done.stderr.splitlines()[-1]
    assert succeeded(ran) == []
