"""The event log keeps every event through kills, restarts and unusual values."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from pillsnap.observe.event_kinds import KINDS
from pillsnap.observe.events import EventFollower, EventLog, follow_events, read_events


def write_steps(log: EventLog, task: str, first: int, last: int) -> None:
    for step in range(first, last + 1):
        log.write("step", task=task, epoch=1, step=step, loss=float(step))


def test_event_is_read_with_version_time_and_kind(tmp_path: Path) -> None:
    before_s = time.time() - 0.001
    with EventLog(tmp_path) as log:
        log.write("step", task="detection", epoch=1, step=1, loss=2.5, losses={"box": 1.5}, lr=3e-4, images_per_s=10.0)
    (event,) = read_events(tmp_path)
    assert event["v"] == 1 and event["kind"] == "step" and before_s <= event["time"] <= time.time() + 0.001
    assert event["loss"] == 2.5 and event["losses"] == {"box": 1.5} and event["lr"] == 3e-4
    assert event["gpu_memory_bytes"] is None and event["eta_s"] is None


def test_numpy_scalars_and_nan_become_plain_json(tmp_path: Path) -> None:
    with EventLog(tmp_path) as log:
        log.write(
            "step",
            task="classification",
            epoch=np.int64(2),
            step=np.int32(7),
            loss=np.float32(0.5),
            losses={"a": float("nan"), "b": np.float64("inf"), "c": np.array(1.25)},
            images_per_s=12,
        )
        log.write(
            "validation", task="detection", epoch=1, step=1, metrics={"map50": np.float16(0.5)}, best=np.bool_(True)
        )
    text = (tmp_path / "events.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    step, validation = read_events(tmp_path)
    assert (step["epoch"], step["step"], step["loss"]) == (2, 7, 0.5)
    assert step["losses"] == {"a": None, "b": None, "c": 1.25}
    assert validation["metrics"] == {"map50": 0.5} and validation["best"] is True


def test_text_is_stored_unchanged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "pillsnap.events")  # xdist cannot send a lone surrogate
    message = '<script>alert("x")</script> 알약\n\u2028 second line\x00'
    with EventLog(tmp_path) as log:
        log.write("warning", message=message)
        log.write("quarantine", task="detection", sample_id=os.fsdecode(b"bad\xff"), reason="cut in half")
    assert len((tmp_path / "events.jsonl").read_bytes().split(b"\n")) == 3
    first, second = read_events(tmp_path)
    assert first["message"] == message
    assert second["sample_id"] == "bad\\udcff"


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("nothing", {}),
        ("warning", {"message": "a", "colour": "red"}),
        ("warning", {}),
        ("step", {"task": "segmentation", "epoch": 1, "step": 1, "loss": 1.0}),
        ("step", {"task": "detection", "epoch": 1, "step": "1", "loss": 1.0}),
        ("step", {"task": "detection", "epoch": 1, "step": 1.5, "loss": 1.0}),
        (
            "run",
            {
                "run_id": "a",
                "name": "a",
                "stage": 1,
                "config": {"f": object()},
                "manifest_hash": "",
                "num_workers": 1,
                "versions": {},
            },
        ),
    ],
)
def test_invalid_event_is_rejected_and_not_written(tmp_path: Path, kind: str, fields: dict) -> None:
    with EventLog(tmp_path) as log, pytest.raises(AssertionError):
        log.write(kind, **fields)
    assert read_events(tmp_path) == []


def test_incomplete_last_line_is_skipped_and_removed_on_open(tmp_path: Path) -> None:
    with EventLog(tmp_path) as log:
        write_steps(log, "detection", 1, 3)
    path = tmp_path / "events.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:40])
    assert [e["step"] for e in read_events(tmp_path)] == [1, 2, 3]
    with EventLog(tmp_path) as log:
        assert path.read_bytes() == whole
        write_steps(log, "detection", 4, 4)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]


def test_incomplete_line_longer_than_a_block_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"kind":"warning","message":"a"}\n' + b"x" * 200_000)
    EventLog(tmp_path).close()
    assert path.read_bytes() == b'{"kind":"warning","message":"a"}\n'
    path.write_bytes(b"y" * 200_000)
    EventLog(tmp_path).close()
    assert path.read_bytes() == b""


def test_restart_from_an_earlier_step_drops_repeated_events(tmp_path: Path) -> None:
    with EventLog(tmp_path) as log:
        log.write("task", task="detection", status="started", epoch=0, step=0)
        write_steps(log, "detection", 1, 5)
        log.write("validation", task="detection", epoch=1, step=5, metrics={"map50": 0.1})
        log.write("examples", task="detection", epoch=1, path="examples/a.png")
        log.write("task", task="detection", status="started", epoch=0, step=3)
        write_steps(log, "detection", 4, 6)
        log.write("validation", task="detection", epoch=1, step=5, metrics={"map50": 0.2})
        log.write("examples", task="detection", epoch=1, path="examples/a.png")
        log.write("task", task="classification", status="started", epoch=0, step=0)
        write_steps(log, "classification", 1, 2)
    events = read_events(tmp_path)
    assert [(e["task"], e["step"]) for e in events if e["kind"] == "step"] == [
        *(("detection", step) for step in range(1, 7)),
        *(("classification", step) for step in (1, 2)),
    ]
    assert [e["metrics"]["map50"] for e in events if e["kind"] == "validation"] == [0.2]
    assert sum(e["kind"] == "examples" for e in events) == 1
    assert sum(e["kind"] == "task" for e in events) == 3


def test_restart_within_a_validation_keeps_one_epoch_end(tmp_path: Path) -> None:
    """The end of the epoch is logged again at the same step."""
    with EventLog(tmp_path) as log:
        for _ in range(2):
            log.write("task", task="detection", status="started", epoch=0, step=3)
            log.write("epoch", task="detection", epoch=1, step=3, loss=0.5)
            log.write("validation", task="detection", epoch=1, step=3, metrics={"map50": 0.1})
    assert [e["kind"] for e in read_events(tmp_path)] == ["task", "task", "epoch", "validation"]


def test_restart_at_the_beginning_of_the_decay_keeps_one_event(tmp_path: Path) -> None:
    """It is logged again at the same step; one of a later step, and what fitted then, never came about."""
    decay = {
        "task": "detection",
        "reason": "budget",
        "end_epoch": 7,
        "planned_epochs": 18,
        "num_steps": 9,
        "share": 0.2,
    }
    rates = {"epochs_fitting": 7, "decay_step": 4, "allowed_s": 9.0, "left_s": 9.0, "step_s": 1.0, "validation_s": 1.0}
    with EventLog(tmp_path) as log:
        log.write("decay", epoch=1, step=3, **decay)
        log.write("decay", epoch=1, step=6, **decay)
        log.write("budget", task="detection", epoch=1, step=6, planned_epochs=18, **rates)
        log.write("task", task="detection", status="started", epoch=1, step=3)
        log.write("decay", epoch=1, step=3, **decay)
        log.write("task", task="detection", status="started", epoch=1, step=5)
    assert [(e["kind"], e["step"]) for e in read_events(tmp_path)] == [("task", 3), ("decay", 3), ("task", 5)]


def test_the_earliest_of_two_restarts_applies(tmp_path: Path) -> None:
    with EventLog(tmp_path) as log:
        write_steps(log, "detection", 1, 9)
        log.write("task", task="detection", status="started", step=2)
        write_steps(log, "detection", 3, 6)
        log.write("task", task="detection", status="started", step=4)
        write_steps(log, "detection", 5, 5)
    assert [e["step"] for e in read_events(tmp_path) if e["kind"] == "step"] == [1, 2, 3, 4, 5]


def test_follower_returns_complete_lines_and_detects_a_replaced_log(tmp_path: Path) -> None:
    follower = EventFollower(tmp_path)
    assert follower.poll() == []
    with EventLog(tmp_path) as log:
        write_steps(log, "detection", 1, 2)
        with log.path.open("ab") as file:
            file.write(b'{"kind":"warn')
        assert [e["step"] for e in follower.poll()] == [1, 2]
        assert follower.poll() == []
        with log.path.open("ab") as file:
            file.write(b'ing","message":"a"}\n')
        assert [e["message"] for e in follower.poll()] == ["a"]
    assert follower.generation == 0
    log.path.unlink()
    with EventLog(tmp_path) as log:
        write_steps(log, "detection", 1, 1)
    assert [e["step"] for e in follower.poll()] == [1]
    assert follower.generation == 1


def test_follow_reads_remaining_events_after_stop(tmp_path: Path) -> None:
    stop = threading.Event()
    got: list[int] = []
    thread = threading.Thread(
        target=lambda: got.extend(e["step"] for e in follow_events(tmp_path, stop, poll_interval_s=0.01))
    )
    thread.start()
    with EventLog(tmp_path) as log:
        write_steps(log, "detection", 1, 200)
        stop.set()
    thread.join(5)
    assert not thread.is_alive()
    assert got == list(range(1, 201))


def test_concurrent_writers_that_are_killed_lose_no_event(tmp_path: Path) -> None:
    code = (
        "import sys; from pillsnap.observe.events import EventLog\n"
        "log = EventLog(sys.argv[1])\n"
        "for i in range(300):\n"
        "    log.write('quarantine', task='detection', sample_id=f'{sys.argv[2]}-{i}', reason='x' * 500)\n"
        "print('done', flush=True)\n"
        "import time; time.sleep(60)\n"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), name], stdout=subprocess.PIPE, text=True)
        for name in "ab"
    ]
    for writer in writers:
        assert writer.stdout is not None and writer.stdout.readline() == "done\n"
        writer.kill()
        writer.communicate()
    events = read_events(tmp_path)
    for name in "ab":
        assert [e["sample_id"] for e in events if e["sample_id"][0] == name] == [f"{name}-{i}" for i in range(300)]


def test_log_at_a_uri_is_read(tmp_path: Path) -> None:
    assert read_events(tmp_path.as_uri()) == []
    with EventLog(tmp_path) as log:
        write_steps(log, "detection", 1, 2)
    assert [e["step"] for e in read_events(tmp_path.as_uri())] == [1, 2]


def test_import_loads_no_heavy_package() -> None:
    heavy = ("torch", "ray", "pyarrow", "numpy", "wandb")
    code = f"import sys, pillsnap.observe.events; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_every_kind_and_field_has_a_description_of_one_line() -> None:
    for kind, model in KINDS.items():
        texts = {name: field.description for name, field in model.model_fields.items()} | {"": model.__doc__}
        assert [name for name, text in texts.items() if not text or "\n" in text] == [], kind
