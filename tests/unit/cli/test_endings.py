"""Every command ends the same way: one line and exit code 2 for an error, whatever raised it; output may be lost."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from typer.testing import CliRunner

from pillsnap.cli import app, results, training
from pillsnap.cli.terminal import dispensable_output
from pillsnap.config import load_settings
from pillsnap.errors import UserError
from pillsnap.observe import logs
from pillsnap.runs.directory import open_run

ERRORS = {
    "disk": (OSError(errno.ENOSPC, "No space left on device"), "The disk is full"),
    "ray": (ActorDiedError(), "A worker process died"),
    "bug": (KeyError("surprise"), "failed: KeyError: 'surprise'"),
    "system": (OSError(errno.EIO, "Input/output error", "/mnt/x"), "A disk or network file system fails"),
}
COMMANDS = (
    ("predict", "--run", "{run}", __file__),
    ("evaluate", "--run", "{run}"),
    ("export", "--run", "{run}"),
    ("verify", "--run", "{run}"),
    ("monitor", "--run", "{run}"),
    ("logs", "--run", "{run}"),
    ("preflight", "--preset", "demo", "--data-root", "{run}", "--run", "{run}"),
)


@pytest.fixture(autouse=True)
def no_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PILLSNAP_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(logging.getLogger("pillsnap"), "handlers", [])
    monkeypatch.setattr("os.nice", lambda by: 0)  # the monitor lowers its own process


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[0])
@pytest.mark.parametrize("name", ERRORS)
def test_any_error_is_one_line_and_exit_code_2(
    words: tuple[str, ...], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error, expected = ERRORS[name]

    def fail(*_: Any, **__: Any) -> None:
        raise error

    for place in (
        "pillsnap.runs.directory.load_run", "pillsnap.runs.driver_lock.driving", "pillsnap.monitor.live_copy.live_copy",
        "pillsnap.storage.local_manifest", "pillsnap.cli.results.opened_run",
    ):  # fmt: skip
        monkeypatch.setattr(place, fail)
    result = CliRunner().invoke(app, [word.format(run=tmp_path) for word in words])
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.output.splitlines() if line.strip()]
    assert line.startswith("pillsnap: ") and expected in line
    if name == "bug":
        trace = tmp_path / "cache" / "error.log"
        assert f"pillsnap {words[0]} failed" in line and line.endswith(f"The full trace is in {trace}.")
        assert "in fail" in trace.read_text()


def test_trace_of_a_command_with_a_log_is_in_that_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        logs.setup_logging(tmp_path)
        raise KeyError("surprise")

    monkeypatch.setattr("pillsnap.runs.driver_lock.driving", fail)
    result = CliRunner().invoke(app, ["evaluate", "--run", str(tmp_path)])
    assert (result.exit_code, len(result.output.splitlines())) == (2, 1)
    assert result.output.endswith(f"The full trace is in {tmp_path / 'train.log'}.\n")
    assert "Traceback" in (tmp_path / "train.log").read_text()


@pytest.mark.parametrize("met", [True, False])
def test_train_ends_with_1_when_a_target_is_missed(
    met: bool, toy_manifest: Path, toy_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pillsnap.train.driver.train_and_evaluate", lambda *_: {"met": met})
    monkeypatch.setattr(training, "show_result", lambda *_: None)
    words = ["train", "--preset", "demo", "--data-root", str(toy_tree), "--manifest", str(toy_manifest)]
    result = CliRunner().invoke(app, [*words, "--run", str(tmp_path / "run")])
    assert result.exit_code == (0 if met else 1), result.output


def test_more_epochs_name_the_way(toy_manifest: Path, toy_tree: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    open_run(run, load_settings("demo"), toy_manifest, toy_tree)
    (run / "metrics.json").write_text("{}")
    more = load_settings("demo", {"detection.epochs": 20, "classification.epochs": 30})
    with pytest.raises(UserError) as caught:
        open_run(run, more, toy_manifest, toy_tree)
    assert str(caught.value) == (
        f"{run} was trained with other settings (classification.epochs was 12 and is 30, detection.epochs was 14 and "
        "is 20): train more in another directory, starting from its models, with --run OTHER "
        f"--set classification.weights={run}/checkpoints/demo_classification_best.pt "
        f"--set detection.weights={run}/checkpoints/demo_detection_best.pt."
    )
    with pytest.raises(UserError, match=r"detection.epochs was 14 and is 20, train.seed"):
        open_run(run, load_settings("demo", {"detection.epochs": 20, "train.seed": 1}), toy_manifest, toy_tree)


LOST = """
import os, pathlib, typer
from pillsnap.cli import __main__, main, terminal
@main.app.command()
def work(path: str) -> None:
    with terminal.progress_bar("x") as step:
        for number in range(3):
            terminal.say("\\uc57d \\u2713 \\udcff " + "x" * 100_000)
            print("plain"); typer.echo("echo"); step(number, 3)
    pathlib.Path(path).write_text("done")
    raise typer.Exit(1)
__main__.main()
"""


@pytest.mark.parametrize("lost", ["full disk", "closed pipe", "closed", "terminal gone", "not encodable", "busy"])
def test_work_is_done_whatever_becomes_of_the_output(lost: str, tmp_path: Path) -> None:
    done = tmp_path / "done"
    command = [sys.executable, "-c", LOST, "work", str(done)]
    variables: dict[str, str] = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "TERM": "xterm"}
    if lost == "full disk":
        with open("/dev/full", "wb") as full:
            code = subprocess.run(command, stdout=full, stderr=full).returncode
    elif lost == "closed pipe":
        code = subprocess.run(["bash", "-c", '"$@" 2>&1 | true; exit ${PIPESTATUS[0]}', "-", *command]).returncode
    elif lost == "closed":
        code = subprocess.run(["bash", "-c", '"$@" >&- 2>&- <&-', "-", *command]).returncode
    elif lost == "terminal gone":
        ours, theirs = os.openpty()
        process = subprocess.Popen(command, stdout=theirs, stderr=theirs)
        os.close(theirs)
        os.close(ours)
        code = process.wait(60)
    elif lost == "busy":  # a pipe in non-blocking mode, read slowly
        ours, theirs = os.pipe()
        os.set_blocking(theirs, False)
        process = subprocess.Popen(command, stdout=theirs, stderr=theirs)
        os.close(theirs)
        with open(ours, "rb") as pipe:
            size = len(pipe.read())
        code = process.wait(60)
        assert size > 300_000
    else:
        ended = subprocess.run(command, env=os.environ | variables, capture_output=True)
        code = ended.returncode
        assert ended.stdout.startswith(b"\\uc57d \\u2713 \\udcff xxx") and ended.stderr == b""
    assert (code, done.read_text()) == (1, "done")


@pytest.mark.parametrize("reason, code", [(errno.ENOSPC, 2), (errno.EPIPE, 0)])
def test_predictions_that_are_lost_are_an_error(
    reason: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(io.BytesIO):
        def write(self, data: Any) -> int:
            raise OSError(reason, os.strerror(reason))

    run = SimpleNamespace(where="", settings=SimpleNamespace(tasks=[]))
    monkeypatch.setattr(results, "opened_run", lambda where: SimpleNamespace(with_enrolled=lambda: run))
    monkeypatch.setattr("pillsnap.runs.best_checkpoints.require_models", lambda where, tasks: [])
    monkeypatch.setattr("pillsnap.cluster.session.ray_session", lambda: dispensable_output())
    monkeypatch.setattr("pillsnap.evaluate.predict.list_photos", lambda paths: [])
    monkeypatch.setattr("pillsnap.evaluate.predict.predict_photos", lambda *_, **__: [{"path": "\udcff", "error": ""}])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(Broken(), write_through=True))
    error = io.TextIOWrapper(io.BytesIO(), write_through=True)
    monkeypatch.setattr(sys, "stderr", error)
    with pytest.raises(SystemExit) as ended:
        app(["predict", "--run", str(tmp_path), "x.png"])
    assert ended.value.code == code
    text = error.buffer.getvalue().decode()  # type: ignore[attr-defined]
    lost = "The result cannot be written to standard output (No space left on device): give a file with --json."
    assert text == ("" if code == 0 else f"pillsnap: {lost}\n")
    with pytest.raises(SystemExit) as ended:
        app(["predict", "--run", str(tmp_path), "x.png", "--json", str(tmp_path / "out.json")])
    assert ended.value.code == 0
    assert json.loads((tmp_path / "out.json").read_text()) == [{"path": "\udcff", "error": ""}]
