"""Event logs as runs write them, and what W&B must have of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pillsnap.observe.events import EventLog

STEPS = 5
History = Callable[[Path], list[dict[str, Any]]]


def run_fields() -> dict[str, Any]:
    config = {"seed": 42, "detection": {"lr": 1e-3}}
    facts = {"run_id": "run 1/a", "name": "demo", "stage": 1, "manifest_hash": "h", "num_workers": 1, "versions": {}}
    return facts | {"config": config}


def write_run(log: EventLog) -> None:
    log.write("run", **run_fields())


def write_epochs(log: EventLog, task: str, first: int, last: int) -> None:
    for epoch in range(first, last + 1):
        for step in range((epoch - 1) * STEPS + 1, epoch * STEPS + 1):
            log.write(
                "step",
                task=task,
                epoch=epoch,
                step=step,
                loss=1.0 / step,
                losses={"box": 0.5, "cls": float("nan")},
                lr=1e-3,
                images_per_s=30.0,
                data_wait_fraction=0.02,
                gpu_memory_bytes=1 << 30,
            )
        at = {"task": task, "epoch": epoch, "step": epoch * STEPS}
        log.write("epoch", **at, loss=1.0 / epoch, images_per_s=30.0, duration_s=2.0)
        log.write("validation", **at, metrics={"map50": epoch / 10}, best=epoch != 3)


def expected_rows(num_epochs: int) -> list[tuple[int, float, float | None, float | None]]:
    return [
        (
            step,
            1.0 / step,
            STEPS / step if step % STEPS == 0 else None,
            step // STEPS / 10 if step % STEPS == 0 else None,
        )
        for step in range(1, num_epochs * STEPS + 1)
    ]


def rows_of(history: list[dict[str, Any]]) -> list[tuple[int, float, float | None, float | None]]:
    return [(r["global_step"], r["train/loss"], r.get("epoch/loss"), r.get("val/map50")) for r in history]


def offline_folders(run_dir: Path, task: str) -> list[Path]:
    return sorted((run_dir / "wandb").glob(f"offline-run-*-run_1_a-{task}"))


def wait_until(condition: Callable[[], bool], timeout_s: float = 120) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "timed out"
        time.sleep(0.05)
