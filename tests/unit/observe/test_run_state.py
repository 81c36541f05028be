"""The state shown by the monitors matches the log, across restarts."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from pillsnap.observe.events import EventLog, follow_events, read_events
from pillsnap.observe.run_state import RunState, Series


def state_of(run_dir: Path) -> RunState:
    """State after all events in file order, superseded ones included."""
    stop = threading.Event()
    stop.set()
    state = RunState()
    for event in follow_events(run_dir, stop):
        state.apply(event)
    return state


def write_run(log: EventLog, run_id: str = "r1") -> None:
    log.write("run", run_id=run_id, name="demo", stage="demo", config={}, manifest_hash="h", num_workers=1, versions={})


def write_epoch(log: EventLog, epoch: int, steps: int = 4, *, task: str = "detection", best: bool = True) -> None:
    for step in range((epoch - 1) * steps + 1, epoch * steps + 1):
        log.write("step", task=task, epoch=epoch, step=step, loss=10.0 / step, images_per_s=5.0, eta_s=60.0)
    log.write("epoch", task=task, epoch=epoch, step=epoch * steps, loss=10.0 / epoch)
    log.write("validation", task=task, epoch=epoch, step=epoch * steps, metrics={"map50": epoch / 10}, best=best)


def test_state_of_a_run(tmp_path: Path) -> None:
    with EventLog(tmp_path) as log:
        write_run(log)
        log.write("task", task="detection", status="started", epochs=5, steps_per_epoch=4, batch_size=8, num_train=32)
        write_epoch(log, 1)
        write_epoch(log, 2, best=False)
        log.write("quarantine", task="detection", sample_id="a", reason="torn")
        log.write("quarantine", task="detection", sample_id="a", reason="torn")
        log.write("quarantine", task="classification", sample_id="a", reason="torn")
    state = state_of(tmp_path)
    task = state.tasks["detection"]
    assert (task.epoch, task.step, task.loss, task.progress) == (2, 8, 10.0 / 8, 0.4)
    assert task.last_validation and task.last_validation["epoch"] == 2
    assert task.best_validation and task.best_validation["metrics"] == {"map50": 0.1}
    assert len(state.quarantined) == 2 and state.status == "running"
    assert state.curves()["detection/val/map50"] == [(4, 0.1), (8, 0.2)]
    assert state.curves()["detection/loss"] == [(step, 10.0 / step) for step in range(1, 9)]


def test_restart_discards_what_is_repeated(tmp_path: Path) -> None:
    with EventLog(tmp_path) as log:
        write_run(log)
        log.write("task", task="detection", status="started", epochs=5, steps_per_epoch=4)
        write_epoch(log, 1)
        write_epoch(log, 2)
        log.write("failure", message="worker died")
        failed = state_of(tmp_path)
        assert (failed.status, failed.tasks["detection"].status) == ("failed", "failed")
        log.write("task", task="detection", status="started", epoch=1, step=5)
        state = state_of(tmp_path)
        task = state.tasks["detection"]
        assert (state.status, task.status, task.step, task.restarts, task.epochs) == ("running", "started", 5, 1, 5)
        assert task.best_validation and task.best_validation["epoch"] == 1
        write_epoch(log, 2)
    from_follower = state_of(tmp_path).curves()
    from_log = RunState()
    for event in read_events(tmp_path):
        from_log.apply(event)
    steps = [x for x, _ in from_log.curves()["detection/loss"]]
    assert steps == sorted(steps) and from_follower["detection/val/map50"] == from_log.curves()["detection/val/map50"]


def test_another_run_in_the_same_log_resets_the_state(tmp_path: Path) -> None:
    with EventLog(tmp_path) as log:
        write_run(log)
        write_epoch(log, 1)
        write_run(log)
        assert state_of(tmp_path).tasks["detection"].step == 4
        write_run(log, "r2")
    state = state_of(tmp_path)
    assert state.generation == 1 and state.curves() == {} and state.tasks["detection"].step == 0


@pytest.mark.parametrize(("met", "status"), [(True, "met"), (False, "missed")])
def test_verdict_sets_the_status(tmp_path: Path, met: bool, status: str) -> None:
    with EventLog(tmp_path) as log:
        write_run(log)
        log.write("verdict", met=met, targets={"top1": {"target": 0.85, "value": 0.9, "met": met}})
    state = state_of(tmp_path)
    assert state.status == status and state.verdict and state.verdict["targets"]["top1"]["value"] == 0.9


def test_an_evaluation_lasts_until_its_verdict(tmp_path: Path) -> None:
    with EventLog(tmp_path) as log:
        write_run(log)
        log.write("evaluation", phase="val photos", done=5, total=9)
        state = state_of(tmp_path)
        assert state.status == "evaluating" and state.view()["evaluation"]["done"] == 5
        log.write("failure", message="worker 0 died")
        assert state_of(tmp_path).status == "failed"
        write_run(log)
        assert state_of(tmp_path).evaluation is None
        log.write("evaluation", phase="val photos", done=9, total=9)
        log.write("verdict", met=True, targets={})
    state = state_of(tmp_path)
    assert state.status == "met" and state.evaluation is None


def test_series_is_bounded_and_keeps_the_mean() -> None:
    series = Series(max_points=16)
    for x in range(1, 1001):
        series.add(x, float(x))
    points = series.points()
    assert 8 <= len(points) <= 16 and points[-1][0] == 1000
    assert [x for x, _ in points] == sorted({x for x, _ in points})
    size = series.bucket_size
    for x, y in points[:-1]:
        assert y == pytest.approx(x - (size - 1) / 2)


def test_series_changes_rebuild_the_curve() -> None:
    """A client that applies every change has the same curve as the server, across averaging and cuts."""
    series = Series(max_points=8)
    client: list[tuple[float, float]] = []
    for x in range(1, 200):
        series.add(x, x * 0.5)
        if x == 77:
            series.cut(40)
            for again in range(41, 78):
                series.add(again, 1.0)
        if x % 3 == 0:
            change = series.take_changes()
            assert change is not None
            client = [p for p in client if p[0] < change["from"]] + change["points"]
            assert client == series.points()
    series.take_changes()
    assert series.take_changes() is None


def test_epochs_without_validation_and_task_events_of_older_versions() -> None:
    state = RunState()
    old = {"kind": "task", "task": "detection", "status": "started", "time": 1.0, "epochs": 4, "steps_per_epoch": 2,
           "batch_size": 8, "num_train": 16, "num_val": 4, "epoch": 0, "step": 0, "duration_s": None}  # fmt: skip
    state.apply(old)
    assert state.tasks["detection"].samples_per_epoch is None
    for epoch in (1, 2):
        state.apply({"kind": "epoch", "task": "detection", "epoch": epoch, "step": 2 * epoch, "loss": 1.0, "time": 2.0})
    task = state.tasks["detection"]
    assert (task.epoch, task.progress, task.last_validation, task.best_validation) == (2, 0.5, None, None)
    assert state.curves() == {"detection/epoch_loss": [(2, 1.0), (4, 1.0)]}
