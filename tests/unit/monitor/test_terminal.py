"""The terminal monitor shows the log, without escape sequences from its texts."""

from __future__ import annotations

import io
import threading
from pathlib import Path

import pytest
from rich.console import Console

from pillsnap.errors import UserError
from pillsnap.monitor import terminal
from pillsnap.observe.events import EventLog


def write_run(log: EventLog) -> None:
    log.write("run", run_id="r", name="night run", stage=3, config={}, manifest_hash="h", num_workers=2, versions={})
    log.write("task", task="detection", status="started", epochs=4, steps_per_epoch=10, batch_size=16)
    for step in range(1, 11):
        log.write(
            "step",
            task="detection",
            epoch=1,
            step=step,
            loss=8.0 / step,
            losses={"box": 0.25},
            lr=3e-4,
            images_per_s=118.2,
            data_wait_fraction=0.04,
            gpu_memory_bytes=3 << 29,
            eta_s=3725.0,
        )
    log.write("validation", task="detection", epoch=1, step=10, metrics={"map50": 0.31, "map50_95": 0.2}, best=True)
    log.write("checkpoint", task="detection", epoch=1, step=10, path="checkpoints/a")
    log.write("warning", message="[bold]text\x1b[2J\x07 here")
    log.write("quarantine", task="detection", sample_id="K-1\x1b]0;x", reason="cut in half")


def shown(run_dir: Path, width: int = 140) -> tuple[int, str]:
    out = io.StringIO()
    code = terminal.watch(run_dir, Console(file=out, width=width))
    return code, out.getvalue()


@pytest.mark.parametrize("width", [80, 140])
def test_running_training(tmp_path: Path, width: int) -> None:
    with EventLog(tmp_path) as log:
        write_run(log)
    code, text = shown(tmp_path, width)
    assert code == 0
    for figure in (
        "night run  running",
        "stage 3 · 2 workers",
        "epoch 1/4  step 10/40  1:02:05 left",
        "0.8000  box 0.250",
        "118 img/s, data wait 4 %",
        "3.00e-04",
        "1.5 GiB",
        "epoch 1 (best)  map50 0.310  map50_95 0.200",
        "epoch 1, checkpoints/a",
        "classification · waiting",
        "loss  0.8 to 8",
        "1 warning",
        "1 photo quarantined",
        "this machine",
    ):
        assert figure in text, figure
    assert any("\u2801" <= char <= "\u28ff" for char in text)
    assert max(len(line) for line in text.splitlines()) <= width
    assert "\x1b" not in text and "\x07" not in text and "[bold]text" in text


@pytest.mark.parametrize(("met", "code", "word"), [(True, 0, "targets met"), (False, 1, "targets missed")])
def test_finished_run(tmp_path: Path, met: bool, code: int, word: str) -> None:
    with EventLog(tmp_path) as log:
        write_run(log)
        log.write("verdict", met=met, targets={"top1": {"target": 0.85, "value": 0.9012, "met": met}})
    got, text = shown(tmp_path)
    assert got == code and word in text and "0.9012" in text and "target 0.85" in text


def test_an_evaluation_is_followed(tmp_path: Path) -> None:
    with EventLog(tmp_path) as log:
        write_run(log)
        log.write("evaluation", phase="val photos", done=5120, total=18525)
    code, text = shown(tmp_path)
    assert code == 0 and "evaluating" in text and "val photos 5,120 of 18,525" in text


def test_failure_is_shown_and_returns_1(tmp_path: Path) -> None:
    with EventLog(tmp_path) as log:
        write_run(log)
        log.write("failure", message="worker 1 died", cause="out of memory", advice="lower the batch size")
    code, text = shown(tmp_path)
    assert code == 1 and "worker 1 died" in text and "lower the batch size" in text


def test_live_view_follows_until_the_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "REFRESH_INTERVAL_S", 0.02)
    out = io.StringIO()
    console = Console(file=out, width=120, force_terminal=True, color_system=None)
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(terminal.watch(tmp_path, console)))
    thread.start()
    with EventLog(tmp_path) as log:
        write_run(log)
        log.write("verdict", met=True, targets={})
    thread.join(10)
    assert codes == [0] and "night run  met" in out.getvalue()


def test_missing_directory_and_missing_log(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a directory"):
        terminal.watch(tmp_path / "nothing")
    code, text = shown(tmp_path)
    assert code == 0 and "no run  waiting" in text


def test_other_nodes_have_a_panel_while_their_samples_are_recent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = {"index": 3, "name": "RTX 5080", "memory_used_bytes": 3 << 30, "memory_total_bytes": 16 << 30}
    gpu |= {"utilization": 0.87, "temperature_c": 66, "power_w": 251.4, "power_limit_w": 360.0}
    memory = {"host_memory_used_bytes": 5 << 30, "host_memory_total_bytes": 64 << 30, "disk_free_bytes": 9 << 30}
    here = terminal.telemetry.sample(tmp_path)["node"]
    with EventLog(tmp_path) as log:
        write_run(log)
        for node in ("gpu-2\x1b[2J", here):
            log.write("system", node=node, gpus=[gpu], cpu_fraction=0.25, **memory)
    _, text = shown(tmp_path)
    assert "\x1b" not in text and text.count("RTX 5080") == 1
    assert "node gpu-2" in text
    assert "GPU 3 RTX 5080: 3.0 GiB of 16.0 GiB, 87 % busy, 66 °C, 251 of 360 W" in text
    assert "memory 5.0 GiB of 64.0 GiB, CPU 25 % busy, disk 9.0 GiB free" in text
    monkeypatch.setattr(terminal, "NODE_MAX_AGE_S", 0.0)
    assert "RTX 5080" not in shown(tmp_path)[1]
