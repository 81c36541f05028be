"""W&B receives every event once and in order, through kills; its failures do not propagate."""

from __future__ import annotations

import itertools
import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from pillsnap.observe.events import EventLog
from pillsnap.tracking.mirror import WandbMirror
from tests.processes import titled
from tests.unit.tracking.recorded_events import (
    STEPS,
    History,
    expected_rows,
    offline_folders,
    rows_of,
    run_fields,
    wait_until,
    write_epochs,
    write_run,
)  # fmt: skip


def test_both_tasks_are_written_to_offline_folders(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, offline_history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    lines: list[str] = []
    temporary = tmp_path_factory.mktemp("temporary")
    monkeypatch.setenv("TMPDIR", str(temporary))
    (tmp_path / "examples").mkdir()
    Image.new("RGB", (8, 8), (200, 0, 0)).save(tmp_path / "examples" / "detection.png")
    mirror = WandbMirror(tmp_path, "pillsnap", mode="offline", on_warning=warnings.append, say=lines.append).start()
    with EventLog(tmp_path) as log:
        write_run(log)
        for task in ("detection", "classification"):
            log.write("task", task=task, status="started", epochs=3, steps_per_epoch=STEPS)
            write_epochs(log, task, 1, 3)
            log.write("examples", task=task, epoch=3, path=f"examples/{task}.png")
            log.write("task", task=task, status="finished", epoch=3, step=15)
        log.write("verdict", met=True, targets={"top1": {"target": 0.85, "value": 0.9, "met": True}})
    assert mirror.close() == lines
    assert warnings == []
    assert not list(temporary.iterdir())  # the mirror removes its temporary files
    (detection,), (classification,) = (offline_folders(tmp_path, task) for task in ("detection", "classification"))
    (evaluation,) = offline_folders(tmp_path, "evaluation")
    assert lines == [f"wandb sync {folder}" for folder in (detection, classification, evaluation)]
    for folder in (detection, classification):
        assert rows_of(offline_history(folder)) == expected_rows(3)
    first, last = (offline_history(detection)[i] for i in (0, -1))
    assert (first["train/lr"], first["train/loss_box"], first["train/data_wait_fraction"]) == (1e-3, 0.5, 0.02)
    assert first["train/gpu_memory_bytes"] == 1 << 30 and "train/loss_cls" not in first
    assert last["examples._type"] == "image-file" and len(list(detection.glob("files/media/images/*.png"))) == 1
    assert not any("wandb-metadata" in p.name or p.name == "requirements.txt" for p in tmp_path.rglob("*"))
    content = classification.joinpath("run-run_1_a-classification.wandb").read_bytes()
    assert b"best/val/map50" in content and b"stage1" in content
    content = evaluation.joinpath("run-run_1_a-evaluation.wandb").read_bytes()
    assert b"verdict/top1_target" in content and b"Targets met" in content


def test_node_telemetry_joins_the_next_row_and_checkpoints_become_artifacts(
    tmp_path: Path, offline_history: History, offline_records: Callable[[Path], Iterator[Any]]
) -> None:
    folder = tmp_path / "checkpoints" / "detection"
    for name, step in (("best", 5), ("last", 10)):
        path = folder / f"step-{step}"
        path.mkdir(parents=True)
        (path / "model.safetensors").write_bytes(bytes(step))
        (folder / f"{name}.json").write_text(json.dumps({"checkpoint": path.name}))
    gpu = {"index": 1, "utilization": 0.9, "memory_used_bytes": 5, "temperature_c": 61, "power_w": None}
    with WandbMirror(tmp_path, "pillsnap", mode="offline"), EventLog(tmp_path) as log:
        write_run(log)
        log.write("task", task="detection", status="started", epochs=2, steps_per_epoch=STEPS)
        write_epochs(log, "detection", 1, 1)
        log.write("system", node="n.1", cpu_fraction=0.5, gpus=[gpu])
        log.write("system", node="n2", cpu_fraction=0.25)
        write_epochs(log, "detection", 2, 2)
        log.write("task", task="detection", status="finished", epoch=2, step=10)
    (run,) = offline_folders(tmp_path, "detection")
    history = offline_history(run)
    assert rows_of(history) == expected_rows(2)
    nodes = [{name: value for name, value in row.items() if name.startswith("nodes/")} for row in history]
    first = {"cpu_fraction": 0.5, "gpu1/utilization": 0.9, "gpu1/memory_used_bytes": 5, "gpu1/temperature_c": 61}
    assert nodes[STEPS] == {f"nodes/n_1/{name}": value for name, value in first.items()} | {
        "nodes/n2/cpu_fraction": 0.25
    }
    assert not any(row for index, row in enumerate(nodes) if index != STEPS)
    artifacts = [r.artifact for r in offline_records(run) if r.WhichOneof("record_type") == "artifact"]
    assert [a.name for a in artifacts] == ["run_1_a-detection-checkpoint"] * 2
    # W&B moves the alias `latest` to each new version.
    assert [set(a.aliases) - {"latest"} for a in artifacts] == [{"best", "step-5"}, {"step-10"}]
    assert "latest" in artifacts[1].aliases
    (file,) = artifacts[1].manifest.contents
    assert (file.local_path, file.size) == (str(folder / "step-10" / "model.safetensors"), 10)  # referenced, not copied


def test_checkpoints_are_not_uploaded_when_disabled(
    tmp_path: Path, offline_records: Callable[[Path], Iterator[Any]]
) -> None:
    folder = tmp_path / "checkpoints" / "detection"
    (folder / "step-5").mkdir(parents=True)
    (folder / "last.json").write_text('{"checkpoint": "step-5"}')
    with WandbMirror(tmp_path, "pillsnap", mode="offline"), EventLog(tmp_path) as log:
        settings = {"wandb": {"upload_checkpoints": False}}
        log.write("run", **(run_fields() | {"config": settings}))
        write_epochs(log, "detection", 1, 1)
    (run,) = offline_folders(tmp_path, "detection")
    assert not [r for r in offline_records(run) if r.WhichOneof("record_type") == "artifact"]


def test_failure_before_the_first_task_is_an_alert(
    tmp_path: Path, offline_records: Callable[[Path], Iterator[Any]]
) -> None:
    with WandbMirror(tmp_path, "pillsnap", mode="offline"), EventLog(tmp_path) as log:
        write_run(log)
        log.write("failure", message="no photos", advice="build a manifest")
    (run,) = offline_folders(tmp_path, "evaluation")
    (alert,) = [r.alert for r in offline_records(run) if r.WhichOneof("record_type") == "alert"]
    assert (alert.title, alert.text, alert.level) == ("Run failed", "no photos  build a manifest", "ERROR")


KILLED = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from pillsnap.observe.events import EventLog
from pillsnap.tracking.mirror import WandbMirror
from recorded_events import write_epochs, write_run
run_dir = Path(sys.argv[1])
mirror = WandbMirror(run_dir, "pillsnap", mode="offline").start()
log = EventLog(run_dir)
write_run(log)
write_epochs(log, "detection", 1, 3)
cursor = run_dir / "wandb" / "mirrored.json"
while not (cursor.exists() and '"validation": 15' in cursor.read_text()):
    time.sleep(0.05)
if sys.argv[3] == "all":
    os.killpg(mirror._process.pid, signal.SIGKILL)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_every_metric_once_and_in_order_after_a_kill_and_resume(tmp_path: Path, offline_history: History) -> None:
    killed = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path), str(Path(__file__).parent), "all"])
    assert killed.wait(200) == -signal.SIGKILL
    with WandbMirror(tmp_path, "pillsnap", mode="offline"), EventLog(tmp_path) as log:
        write_run(log)
        log.write("task", task="detection", status="started", epoch=2, step=2 * STEPS)
        write_epochs(log, "detection", 3, 5)
        log.write("task", task="detection", status="started", epoch=3, step=3 * STEPS)
        write_epochs(log, "detection", 4, 4)  # a worker started again, and was interrupted behind where it had been
        write_epochs(log, "classification", 1, 1)
    (folder,) = offline_folders(tmp_path, "detection")
    assert rows_of(offline_history(folder)) == expected_rows(5)

    # Resumed once more: what is finished is left alone.
    (other,) = offline_folders(tmp_path, "classification")
    with WandbMirror(tmp_path, "pillsnap", mode="offline") as mirror, EventLog(tmp_path) as log:
        write_run(log)
        log.write("warning", message="nothing to do")
    assert mirror.close() == [f"wandb sync {folder}", f"wandb sync {other}"]
    assert offline_folders(tmp_path, "classification") == [other]


def test_offline_folders_upload_and_continue_with_wandb_sync(
    tmp_path: Path, wandb_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`wandb sync` uploads the offline folder of a first session, then that of a resumed one."""
    with EventLog(tmp_path) as log:
        for first, last in ((1, 2), (2, 3)):
            with WandbMirror(tmp_path, "pillsnap", mode="offline") as mirror:
                write_run(log)
                log.write("task", task="detection", status="started", step=(first - 1) * STEPS)
                write_epochs(log, "detection", first, last)
            (line,) = mirror.close()
            with monkeypatch.context() as account:
                account.setenv("WANDB_BASE_URL", wandb_server.url)
                account.setenv("WANDB_API_KEY", "k" * 40)
                subprocess.run([sys.executable, "-m", *shlex.split(line)], check=True, timeout=60, capture_output=True)
            assert rows_of(wandb_server.rows["run_1_a-detection"]) == expected_rows(last)
    assert len(offline_folders(tmp_path, "detection")) == 2 and mirror.close() == [line]


def test_online_resume_sends_only_missing_rows(
    tmp_path: Path, wandb_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", wandb_server.url)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    warnings: list[str] = []
    with EventLog(tmp_path) as log:
        for first, last in ((1, 2), (2, 3)):
            with WandbMirror(tmp_path, "pillsnap", on_warning=warnings.append):
                write_run(log)
                log.write("task", task="detection", status="started", step=(first - 1) * STEPS)
                write_epochs(log, "detection", first, last)
            assert rows_of(wandb_server.rows["run_1_a-detection"]) == expected_rows(last)
    assert warnings == []
    run = wandb_server.upserts[0]
    assert (run["name"], run["groupName"], run["jobType"]) == ("run_1_a-detection", "run 1/a", "detection")
    assert run["tags"] == ["stage1", "detection"] and not run["repo"] and run["program"] == "pillsnap"
    assert json.loads(run["config"])["seed"]["value"] == 42
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or b"k" * 40 not in path.read_bytes(), path


def mirror_processes() -> list[psutil.Process]:
    """Child processes of the mirror, without those of Ray."""
    return titled("wandb")


@pytest.mark.parametrize("token", ["3-1-unix-/none/of/a/notebook", "3-1-tcp-localhost-1", "of another version"])
def test_service_of_a_notebook_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    monkeypatch.setenv("WANDB_SERVICE", token)
    warnings: list[str] = []
    mirror = WandbMirror(tmp_path, "pillsnap", mode="offline", on_warning=warnings.append)
    with mirror, EventLog(tmp_path) as log:
        write_run(log)
        write_epochs(log, "detection", 1, 1)
    assert warnings == [] and len(offline_folders(tmp_path, "detection")) == 1


@pytest.mark.parametrize("failure", ["import", "unauthorised", "upload", "service", "process"])
def test_failure_is_one_warning(
    tmp_path: Path, wandb_server: Any, monkeypatch: pytest.MonkeyPatch, failure: str, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", wandb_server.url)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    if failure == "import":
        (tmp_path / "wandb.py").write_text("raise ImportError('broken')")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    wandb_server.refuse_all = failure == "unauthorised"
    wandb_server.refuse_uploads = failure == "upload"
    warnings: list[str] = []
    mirror = WandbMirror(tmp_path / "run", "pillsnap", mode="online", on_warning=warnings.append).start()
    assert mirror._process is not None
    process = psutil.Process(mirror._process.pid)
    with EventLog(tmp_path / "run") as log:
        write_run(log)
        write_epochs(log, "detection", 1, 2)
        if failure in ("service", "process"):
            wait_until(lambda: (tmp_path / "run" / "wandb" / "mirrored.json").exists())
            victims = process.children() if failure == "service" else [process]
            assert [victim.name() for victim in victims] == (
                ["wandb-core"] if failure == "service" else [process.name()]
            )
            victims[0].kill()
        write_epochs(log, "detection", 3, 4)
        epochs = itertools.count(5)

        def warned() -> bool:
            """A killed service may still take the events of its last moment: training goes on and sends more."""
            write_epochs(log, "detection", epoch := next(epochs), epoch)
            return bool(warnings)

        if failure != "upload":
            wait_until(warned)
    mirror.close()
    (warning,) = warnings
    assert "\n" not in warning and "k" * 40 not in warning and "training continues" in warning
    if failure in ("upload", "service"):
        assert f"`wandb sync {tmp_path}/run/wandb/run-" in warning
    recorded = [f"wandb sync {folder}\n" for folder in offline_folders(tmp_path / "run", "detection")]
    assert len(recorded) == (failure == "unauthorised")
    assert capfd.readouterr() == ("".join(recorded), "")
    assert mirror_processes() == []


def test_process_finishes_after_the_driver_was_killed(tmp_path: Path, offline_history: History) -> None:
    killed = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path), str(Path(__file__).parent), "driver"])
    wait_until(lambda: bool(psutil.Process(killed.pid).children()))
    (process,) = psutil.Process(killed.pid).children()
    killed.wait(200)
    process.wait(120)
    (folder,) = offline_folders(tmp_path, "detection")
    assert rows_of(offline_history(folder)) == expected_rows(3)


def test_its_processes_have_the_lowest_priority_and_end_with_it(tmp_path: Path) -> None:
    """W&B's service leads another session, which does not inherit the priority of the session."""
    mirror = WandbMirror(tmp_path, "pillsnap", mode="offline").start()
    assert mirror._process is not None
    follower = psutil.Process(mirror._process.pid)
    with EventLog(tmp_path) as log:
        write_run(log)
        write_epochs(log, "detection", 1, 1)
        wait_until(lambda: (tmp_path / "wandb" / "mirrored.json").exists())
    (service,) = follower.children()
    for process in (follower, service):
        assert process.nice() == 19
        session = Path(f"/proc/{process.pid}/autogroup")
        assert not session.exists() or session.read_text().split()[-2:] == ["nice", "19"]
    follower.kill()
    mirror.close()
    service.wait(10)
