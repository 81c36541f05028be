"""All parts of one short lease of a GPU machine, in at most 530 s: `python -m benchmarks.gpu --lease`.

Planned seconds on a machine with 16 cores and an H100:

    0 to 200   beside each other, timing nothing
               lane 1: gpu-tests 20, losses 30, memory 40, loader 30        lane 2: end-to-end 150
               background, at low priority: photos 10, prepare-classification 45, prepare-detection 45;
               the processes that compile the models of the timed steps, 100 to 250
    to 300     one after the other, nothing else running: detection-yolo11m 25, classification-128 20, timm-128 8,
               detection-yolo11s 20
    to 420     store-classification 60, store-detection 60
    to 530     store-classification-compiled, where at least 80 s are left
               (only when asked for by --parts: classification-32, ultralytics-yolo11m; stage3, which takes 510 s)

The first phase ends after 285 s: what is not ready then is named and killed. Every part has a limit of its own. Results
are printed as they come; the JSON file is written after each part, into the folder $OUT too, with the logs of failed
parts and the event logs of the runs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.lease.jobs import Job, kill_marked

TOTAL_S = 530.0
FIRST_PHASE_S = 285.0
"""After the start; leaves time for the timed steps and one store part."""
LIMITS_S = {
    "loader": 80, "gpu-tests": 90, "losses": 100, "memory": 120, "end-to-end": 270,
    "photos": 120, "prepare-classification": 150, "prepare-detection": 150,
    "store-classification": 120, "store-detection": 120, "store-classification-compiled": 230, "stage3": 520,
}  # fmt: skip
LANES = (("gpu-tests", "losses", "memory", "loader"), ("end-to-end",))
DATA = ("photos", "prepare-classification", "prepare-detection")
STEPS = (
    "detection-yolo11m", "classification-128", "timm-128", "detection-yolo11s", "classification-32",
    "ultralytics-yolo11m",
)  # fmt: skip
STEP_PARTS_FIRST = STEPS[:2]
"""The store parts need their compiled models and their figures."""
STORES = ("store-classification", "store-detection", "store-classification-compiled", "stage3")
PARTS = (*LANES[0], *LANES[1], *DATA, *STEPS, *STORES)
_ON_REQUEST = ("classification-32", "ultralytics-yolo11m", "stage3")
_STEP_LIMIT_S = 60.0
"""For the timing alone, once it is prepared."""
_LEAST_FOR_STORE_S = 80.0
_LOG_BYTES = 2**20


class Lease:
    """The jobs of one lease, and what has become of them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.started_s = time.monotonic()
        self.quick: bool = options.quick
        self.folder: Path = (options.folder or Path(tempfile.mkdtemp(prefix="pillsnap-lease-"))).absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.json: Path | None = options.json
        self.out = Path(os.environ["OUT"]) if os.environ.get("OUT") else None
        self.wanted = [part for part in PARTS if part in (options.parts or set(PARTS) - set(_ON_REQUEST))]
        caches = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
        self.environment = {name: str(self.folder / folder) for name, folder in caches.items()}
        # Four of the timed steps compile at a time.
        compiling = min(4, sum(name in STEPS for name in self.wanted)) or 1
        self.environment |= {
            "TORCHINDUCTOR_COMPILE_THREADS": str(max(1, (os.cpu_count() or 4) // compiling)), "YOLO_OFFLINE": "1",
            "YOLO_AUTOINSTALL": "False", "RAY_USAGE_STATS_ENABLED": "0", "WANDB_MODE": "disabled",
        }  # fmt: skip
        self.jobs: dict[str, Job] = {}
        for name in self.wanted:
            for suffix in ("json", "ready", "go"):
                (self.folder / f"{name}.{suffix}").unlink(missing_ok=True)

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started_s

    def say(self, text: str) -> None:
        print(f"{self.elapsed_s:5.0f} s  {text}", flush=True)

    def start(self, name: str, limit_s: float, nice: int = 0) -> Job:
        limit_s = min(limit_s, TOTAL_S - self.elapsed_s)
        self.jobs[name] = job = Job(name, self.folder, limit_s, nice, self.environment)
        job.start(self.quick)
        return job

    def watch(self, pause_s: float = 0.25) -> None:
        """Print what is new, and notice what has ended."""
        time.sleep(pause_s)
        for job in self.jobs.values():
            was_running = job.running
            job.poll()
            for line in job.new_lines():
                self.say(f"{job.name}: {line}")
            if was_running and not job.running:
                self.ended(job)

    def ended(self, job: Job) -> None:
        """Say how a part ended and write everything that is known."""
        self.say(f"--- {job.name}: {job.status} after {job.seconds:.0f} s")
        if job.status != "ok" and job.log_path.exists():
            tail = job.log_path.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
            for line in tail:
                self.say(f"    | {line[:240]}")
        self.write()

    def kill(self, job: Job, why: str) -> None:
        if job.running:
            job.end(why)
            self.ended(job)

    def write(self) -> None:
        results: dict[str, Any] = {"machine": _machine(), "elapsed_s": round(self.elapsed_s, 1)}
        results |= {name: job.outcome() for name, job in self.jobs.items()}
        text = json.dumps(results, indent=1, default=str)
        for path in {self.json, self.out and self.out / "lease.json"} - {None}:
            path.write_text(text, encoding="utf-8")  # type: ignore[union-attr]
        if self.out:
            self._copy_logs(self.out)

    def _copy_logs(self, out: Path) -> None:
        for name, source in (
            ("e2e-train.log", "e2e-run/train.log"), ("e2e-events.jsonl", "e2e-run/events.jsonl"),
            ("store-classification-events.jsonl", "store-classification-run/events.jsonl"),
            ("store-detection-events.jsonl", "store-detection-run/events.jsonl"),
            ("stage3-events.jsonl", "stage3-run/events.jsonl"), ("stage3-report.html", "stage3-run/report.html"),
        ):  # fmt: skip
            path = self.folder / source
            if path.exists() and path.stat().st_size < 15 * 2**20:
                with suppress(OSError):
                    shutil.copyfile(path, out / name)
        # One file for all: only few come back.
        failed = [job for job in self.jobs.values() if job.status and job.status != "ok" and job.log_path.exists()]
        with (out / "failed-parts.log").open("wb") as file:
            for job in failed:
                file.write(f"\n===== {job.name}: {job.status}\n".encode())
                file.write(job.log_path.read_bytes()[-_LOG_BYTES:])

    # --- the three phases ---------------------------------------------------------------------------------------------

    def run(self) -> bool:
        """All parts that are wanted; whether each ended well."""
        self.say(json.dumps(_machine()))
        try:
            self.prepare()
            self.time_steps()
            self.time_stores()
        finally:
            for job in self.jobs.values():
                self.kill(job, "killed at the end")
            kill_marked(f"{self.folder}:")
            self.write()
        bad = [f"{name} ({job.status})" for name, job in self.jobs.items() if job.status != "ok"]
        missing = [name for name in self.wanted if name not in self.jobs]
        self.say(f"done; not ok: {', '.join(bad) or 'none'}; not started: {', '.join(missing) or 'none'}")
        return not bad and not missing

    def prepare(self) -> None:
        """Everything that times nothing, beside each other, until it is done and the timed steps are ready."""
        lanes = [[name for name in lane if name in self.wanted] for lane in (*LANES, DATA)]
        for name in STEPS:
            if name in self.wanted:
                self.start(name, TOTAL_S, nice=5 if name in STEP_PARTS_FIRST else 15)
        current: list[Job | None] = [None] * len(lanes)
        while self.elapsed_s < FIRST_PHASE_S:
            for number, lane in enumerate(lanes):
                running = current[number]
                if lane and (running is None or not running.running):
                    name = lane.pop(0)
                    current[number] = self.start(name, LIMITS_S[name], nice=5 * (name in DATA))
            self.watch()
            busy = any(lanes) or any(job is not None and job.running for job in current)
            if not busy and all(self.is_ready(name) or not self.jobs[name].running for name in self.steps):
                break
        for name, job in self.jobs.items():
            if job.running and not (name in STEPS and self.is_ready(name)):
                self.kill(job, f"not finished or ready after {self.elapsed_s:.0f} s")
        self.say(f"=== timing; ready: {', '.join(name for name in self.steps if self.jobs[name].running)}")

    @property
    def steps(self) -> list[str]:
        return [name for name in STEPS if name in self.jobs]

    def is_ready(self, name: str) -> bool:
        return (self.folder / f"{name}.ready").exists()

    def time_steps(self) -> None:
        for name in self.steps:
            job = self.jobs[name]
            if not job.running:
                continue
            job.raise_priority()
            (self.folder / f"{name}.go").touch()
            until_s = min(self.elapsed_s + _STEP_LIMIT_S, TOTAL_S)
            while job.running and self.elapsed_s < until_s:
                self.watch()
            self.kill(job, f"killed after {_STEP_LIMIT_S:.0f} s of timing")

    def time_stores(self) -> None:
        for name in STORES:
            if name not in self.wanted:
                continue
            if TOTAL_S - self.elapsed_s < _LEAST_FOR_STORE_S:
                self.say(f"--- {name}: not started, {TOTAL_S - self.elapsed_s:.0f} s are left")
                continue
            job = self.start(name, LIMITS_S[name])
            while job.running:
                self.watch()


def _machine() -> dict[str, Any]:
    import torch

    gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name(0) if gpu else "no GPU", "torch": torch.__version__,
        "python": platform.python_version(), "cores": os.cpu_count(),
    }  # fmt: skip


def run_lease(options: argparse.Namespace) -> None:
    """Run the parts; exit status 1 when one did not end well."""
    unknown = set(options.parts or ()) - set(PARTS)
    if unknown:
        sys.exit(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    sys.exit(0 if Lease(options).run() else 1)
