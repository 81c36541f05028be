"""The stage 3 job at toy size, and readers of its run directory."""

from __future__ import annotations

import json
import re
from collections import Counter
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from pillsnap.data.samples import classification_samples, detection_samples
from pillsnap.manifest.table import read_manifest
from tests.cluster.ray_hosts import RayHosts
from tests.reliability.harness import FAULTS_FILE

Events = list[dict[str, Any]]
SETTINGS: dict[str, Any] = {
    "detection.model": "yolo11n",
    "detection.weights": "random",
    "detection.image_size_px": 64,
    "detection.epochs": 2,
    "detection.samples_per_epoch": "null",  # every photo once: the preset's number repeats a toy's hundreds of times
    "detection.combination_share": "null",
    "detection.validate_every": 1,
    "detection.mosaic_off_epochs": 1,
    "detection.batch_size": 8,
    "detection.warmup_epochs": 1,
    "classification.model": "resnet10t",
    "classification.weights": "random",
    "classification.image_size_px": 32,
    "classification.epochs": 2,
    "classification.samples_per_epoch": "null",
    "classification.validate_every": 1,
    "classification.batch_size": 8,
    "train.num_workers": 2,
    "train.cpus_per_worker": 0.75,  # one worker per host with one CPU
    "train.amp": "off",
    "train.log_every_steps": 1,
    "data.decoding_cpus": 0.25,
    "targets.top1": "null",  # exit code 0
    "targets.map50": "null",
    "wandb.mode": "disabled",
}


def arguments(run_dir: Path | str, manifest: Path | str, data_root: Path | str, **overrides: Any) -> list[str]:
    """The command line of jobs/train_stage3.py; `train__num_workers="1:2"` stands for train.num_workers."""
    settings = SETTINGS | {key.replace("__", "."): value for key, value in overrides.items()}
    assignments = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    return ["--run", str(run_dir), "--manifest", str(manifest), "--data-root", str(data_root), *assignments]


def submit_counted(cluster: RayHosts, job_id: str, ids: Path, *rest: str, step_pause_s: float = 0.0) -> str:
    """Submit a training whose workers record the samples of every step in the folder `ids`, and pause at every step.

    Workers use one thread: the summation order of two threads differs, and Adam's first steps amplify that to the
    third decimal of the loss.
    """
    ids.mkdir(parents=True, exist_ok=True)
    faults = {"record_ids": str(ids), "step_pause_s": step_pause_s, "threads": 1}
    (ids / FAULTS_FILE).write_text(json.dumps(faults))
    return cluster.submit(
        "python", "-m", "tests.cluster.counted", "jobs/train_stage3.py", *rest, job_id=job_id,
        variables={"PILLSNAP_FAULTS": str(ids / FAULTS_FILE)},
    )  # fmt: skip


def losses(events: Events, task: str) -> dict[int, float]:
    """Loss by step."""
    steps = [e for e in events if e["kind"] == "step" and e["task"] == task]
    assert len({e["step"] for e in steps}) == len(steps)
    return {e["step"]: e["loss"] for e in steps}


def epochs(events: Events, task: str) -> list[int]:
    """Epochs in the log, in order."""
    return [e["epoch"] for e in events if e["kind"] == "epoch" and e["task"] == task]


def recorded(ids: Path, task: str) -> list[dict[str, Any]]:
    """Records of the steps of a task."""
    lines = [line for path in sorted(ids.glob("ids-*.jsonl")) for line in path.read_text().splitlines()]
    return [row for row in map(json.loads, lines) if row["task"] == task]


def sample_counts(ids: Path, task: str, steps_per_epoch: int) -> list[Counter]:
    """Per epoch, the number of steps with each sample; a step repeated after a failure counts once."""
    steps: dict[int, set[int]] = {}
    for row in recorded(ids, task):
        steps.setdefault(row["step"], set()).update(row["ids"])
    counts: dict[int, Counter] = {}
    for step, members in steps.items():
        counts.setdefault((step - 1) // steps_per_epoch, Counter()).update(members)
    return [counts[epoch] for epoch in sorted(counts)]


def assert_every_sample_once(events: Events, ids: Path, manifest: Path, task: str, num_epochs: int) -> int:
    """Assert that every training sample occurred once per epoch; returns the number of samples."""
    table = read_manifest(manifest)
    codes = sorted({code for row in table["codes"].to_pylist() for code in row})
    if task == "detection":
        samples = detection_samples(table)
    else:
        samples = classification_samples(table, codes)
    number = len(samples.train)
    started = next(e for e in events if e["kind"] == "task" and e["task"] == task)
    assert started["num_train"] == number
    counts = sample_counts(ids, task, started["steps_per_epoch"])
    assert counts == [Counter(range(number))] * num_epochs
    return number


def starts(run_dir: Path) -> list[dict[int, str]]:
    """Per start of the workers, the host of each rank, from train.log."""
    found: list[dict[int, str]] = []
    log, begun = run_dir / "train.log", datetime.min
    for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else []:
        match = re.match(r"(\S+ \S+),.* rank (\d+) +pillsnap\.train\.worker: \w+ on ([^,]+), process", line)
        if match:
            time, rank = datetime.fromisoformat(match[1]), int(match[2])
            # Ranks come in any order, within a second; a failure is noticed only after many.
            if not found or rank in found[-1] or time - begun > timedelta(seconds=10):
                found.append({})
                begun = time
            found[-1][rank] = match[3]
    return found
