"""The progress view shows the log, with and without a terminal, and its errors do not propagate."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import pytest
from rich.console import Console

from pillsnap.observe.events import EventLog
from pillsnap.observe.progress import ProgressView, format_duration


def write_task(log: EventLog) -> None:
    log.write("task", task="detection", status="started", epochs=2, steps_per_epoch=3, num_train=24, num_val=8)
    for epoch in (1, 2):
        for step in range(1, 4):
            global_step = (epoch - 1) * 3 + step
            log.write(
                "step",
                task="detection",
                epoch=epoch,
                step=global_step,
                loss=2.0 / global_step,
                images_per_s=99.6,
                data_wait_fraction=0.031,
                eta_s=3725.0,
            )
        log.write(
            "epoch", task="detection", epoch=epoch, step=epoch * 3, loss=2.0 / epoch, images_per_s=99.6, duration_s=41
        )
        log.write(
            "validation", task="detection", epoch=epoch, step=epoch * 3, metrics={"map50": 0.25 * epoch}, best=True
        )
    log.write("warning", message="disk [red]almost[/] full")
    log.write("task", task="detection", status="finished", epoch=2, step=6, duration_s=82.0)
    log.write("task", task="classification", status="skipped")


def test_plain_lines_without_a_terminal(tmp_path: Path) -> None:
    out = io.StringIO()
    with EventLog(tmp_path) as log:
        log.write("warning", message="from an earlier run")
        with ProgressView(tmp_path, Console(file=out, width=40)):
            write_task(log)
    assert out.getvalue().splitlines() == [
        "detection started: 2 epochs, 3 steps per epoch, 24 training samples, 8 validation samples",
        "detection epoch 1/2  loss 2.0000  100 img/s  41 s  1:02:05 left",
        "detection epoch 1/2  validation: map50 0.250 (best)",
        "detection epoch 2/2  loss 1.0000  100 img/s  41 s  1:02:05 left",
        "detection epoch 2/2  validation: map50 0.500 (best)",
        "warning: disk [red]almost[/] full",
        "detection finished in 1:22",
        "classification skipped",
    ]


def test_line_of_short_epochs_and_rare_validations(tmp_path: Path) -> None:
    out = io.StringIO()
    with EventLog(tmp_path) as log, ProgressView(tmp_path, Console(file=out, width=40)):
        log.write(
            "task", task="detection", status="started", epochs=9, steps_per_epoch=250, num_train=81_475, num_val=2000,
            samples_per_epoch=4000, validate_every=3,
        )  # fmt: skip
        log.write("epoch", task="detection", epoch=1, step=250, loss=1.5)
    assert out.getvalue().splitlines() == [
        "detection started: 9 epochs, 250 steps per epoch, 81,475 training samples, 4,000 of them per epoch, "
        "2,000 validation samples, 3 epochs from one validation to the next",
        "detection epoch 1/9  loss 1.5000",
    ]


def test_budget_and_decay_are_lines_and_change_the_last_epoch(tmp_path: Path) -> None:
    out = io.StringIO()
    at = {"task": "detection", "planned_epochs": 18}
    with EventLog(tmp_path) as log, ProgressView(tmp_path, Console(file=out, width=40)):
        log.write("task", task="detection", status="started", epochs=18)
        log.write("budget", **at, epoch=1, step=9, epochs_fitting=7, decay_step=56, allowed_s=7200.0, left_s=7110.0,
                  step_s=1.5, validation_s=20.0)  # fmt: skip
        log.write("decay", **at, epoch=5, step=56, reason="budget", end_epoch=7, num_steps=14, share=0.2)
        log.write("epoch", task="detection", epoch=6, step=60, loss=1.0)
    assert out.getvalue().splitlines()[1:] == [
        "detection: 7 of 18 epochs fit in the 1:58:30 left for it; the decay begins after step 56",
        "detection: the learning rate decays from step 56 on (budget), for 14 steps, 20 % of all; the last epoch is 7",
        "detection epoch 6/7  loss 1.0000",
    ]


def test_bars_on_a_terminal(tmp_path: Path) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=160, color_system=None)
    with EventLog(tmp_path) as log, ProgressView(tmp_path, console):
        write_task(log)
    text = out.getvalue()
    assert "detection" in text and "100 %" in text and "warning: disk [red]almost[/] full" in text
    last = [line for line in text.splitlines() if "epoch 2/2" in line][-1]
    for figure in ("step 6/6", "loss 0.333", "map50 0.500", "100 img/s", "data wait 3 %", "done in 1:22"):
        assert figure in last


def test_error_in_the_view_is_logged_and_not_raised(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError("terminal closed")

    with (
        caplog.at_level(logging.ERROR),
        EventLog(tmp_path) as log,
        ProgressView(tmp_path, Console(file=Broken())),
    ):
        write_task(log)
    assert "the progress view failed; training continues" in caplog.text


@pytest.mark.parametrize(
    ("duration_s", "text"),
    [(None, "–"), (0.4, "0 s"), (59.4, "59 s"), (59.6, "1:00"), (3725, "1:02:05"), (90000, "25:00:00")],
)
def test_durations(duration_s: float | None, text: str) -> None:
    assert format_duration(duration_s) == text
