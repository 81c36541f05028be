"""Two workers over gloo: communication during the backward pass, and patience while one of them compiles."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing, nn
from torch._dynamo.backends.registry import lookup_backend

from pillsnap.config import load_settings
from pillsnap.planner.measure import mock_batch
from pillsnap.tasks.registry import make_task
from pillsnap.train.step import training_state
from pillsnap.train.step.collectives import WorkerGroup
from pillsnap.train.step.microbatch import MicrobatchRunner
from pillsnap.train.step.training_state import TrainingState

CPU = torch.device("cpu")
TIMEOUT_S, COMPILATION_S = 3.0, 4.5
SMALL = {"classification.image_size_px": 64, "train.amp": "off", "train.compile": "on"}


def run_two(work: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """The results of `work(rank, ...)` in two processes with a process group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(_start, (port, work, folder, arguments), nprocs=2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def _start(rank: int, port: int, work: Callable[..., Any], folder: Path, arguments: tuple[Any, ...]) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=TIMEOUT_S))
    training_state.compile_problem = lambda device: None
    (folder / f"{rank}.json").write_text(json.dumps(work(rank, *arguments)))
    os._exit(0)  # after a timeout, destroying the group would wait


def new_state(compile_graph: Any = "aot_eager") -> TrainingState:
    torch._dynamo.reset()
    compiled = nn.Module.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "compile", lambda self, **options: compiled(self, backend=compile_graph, **options))
        settings, group = load_settings("demo", SMALL), WorkerGroup(CPU, TIMEOUT_S)
        task = make_task("classification", settings, ["K-1", "K-2"])
        return TrainingState(
            task, settings.train, CPU, group, MicrobatchRunner(task.name, 4, group, None, print), None
        )  # fmt: skip


def step(state: TrainingState, number: int) -> None:
    state.step(mock_batch(state._task, 4, CPU, 2), 0.01, 8, number)


def trace_of_a_step(rank: int) -> dict[str, Any]:
    """Intervals of a step's backward parts, and starts of its all-reduces, us; then of a model compiled outside DDP."""
    found: dict[str, Any] = {}
    for way in ("inside", "outside"):
        state = new_state()
        if way == "outside":
            state._losses(mock_batch(state._task, 4, CPU, 2))  # compiles the model
        for number in range(6):  # the careful steps, then those in which the buckets take their final order
            step(state, number)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            step(state, 6)
        events = sorted((event.time_range.start, event.time_range.end, event.name) for event in profiler.events())
        found[way] = {
            "backward": [(start, end) for start, end, name in events if name == "CompiledFunctionBackward"],
            "all_reduce": [start for start, _, name in events if name == "c10d::allreduce_"],
        }
    return found


def test_all_reduce_of_the_first_bucket_begins_before_the_backward_pass_ends(tmp_path: Path) -> None:
    """The control, a graph compiled outside DistributedDataParallel, gives all gradients at its end."""
    for worker in run_two(trace_of_a_step, tmp_path):
        backward, all_reduce = worker["inside"]["backward"], worker["inside"]["all_reduce"]
        assert len(backward) >= 2 and len(all_reduce) >= 2
        assert all_reduce[0] < backward[-1][0]
        backward, all_reduce = worker["outside"]["backward"], worker["outside"]["all_reduce"]
        assert len(backward) == 1 and all_reduce[0] >= backward[0][1]


def slow_compilation(rank: int) -> dict[str, Any]:
    """Rank 1 compiles for longer than the timeout; later it hangs as long: that error, and the time to it."""
    aot_eager = lookup_backend("aot_eager")

    def slow(*arguments: Any, **options: Any) -> Any:
        time.sleep(COMPILATION_S * rank)
        return aot_eager(*arguments, **options)

    state = new_state(slow)
    for number in range(6):
        step(state, number)
    started_s, error = time.monotonic(), ""
    time.sleep(COMPILATION_S * rank)
    try:
        step(state, 6)
    except RuntimeError as failure:
        error = str(failure)
    return {"error": error, "after_s": time.monotonic() - started_s}


def test_workers_wait_for_one_that_compiles_and_no_longer_for_one_that_hangs(tmp_path: Path) -> None:
    first, _ = run_two(slow_compilation, tmp_path)
    assert "imed out" in first["error"], first
    assert TIMEOUT_S - 1 < first["after_s"] < COMPILATION_S
