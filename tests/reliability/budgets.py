"""Training on simulated machines, whose clock goes on by what a step takes there, and killed at given points.

python -m tests.reliability.budgets FOLDER: one run per point of KILLS, killed there and continued.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pillsnap.data.plan import StreamPlan
from pillsnap.runs.checkpoint import Position
from pillsnap.train import checkpoint_writer, task_log
from pillsnap.train.job import Job
from pillsnap.train.schedule.time_budget import TimeBudget
from pillsnap.train.step.training_state import TrainingState
from tests.unit.train.test_loop import LoopOfOne, SmallTask

EPOCHS, STEPS = 20, 10
PLAN = StreamPlan(seed=0, epochs=EPOCHS, num_train=4 * STEPS, num_val=8, batch_size=4, num_workers=1)
STEP_S, VALIDATION_STEP_S, START_S = 1.0, 0.5, 10.0
BUDGET_S = 280.0
"""At full speed 20 epochs take 230 s."""
SLOW = 3.0
DECISION = 56
"""At a third of the speed 7 epochs of 10 steps fit: the decay begins after 80 % of their steps."""


class SimulatedRun(LoopOfOne):
    """A run with a time budget on a machine that takes `slowness` times as long; its clock is `now_s`."""

    def __init__(
        self, run_dir: Path, slowness: float, budget_s: float = BUDGET_S, plan: StreamPlan = PLAN, **train: Any
    ) -> None:
        limits = {"schedule": "wsd", "time_budget_minutes": budget_s / 60, "log_every_steps": 1}
        super().__init__(run_dir, plan=plan, **limits | train)
        self.slowness, self.now_s = slowness, 0.0
        self.slower_from: dict[int, float] = {}
        """Slowness from a step on."""
        self.budget = TimeBudget(budget_s, spent_s=0.0, share=1.0, num_judged=PLAN.num_val)

    def train(self, stop_at: Callable[[int], bool] = lambda polls: False) -> Position:
        step, validate, elapsed_s = TrainingState.step, SmallTask.validate, Job.elapsed_s
        self.now_s = START_S
        torch.set_num_threads(1)

        def slow_step(*arguments: Any) -> Any:
            self.slowness = self.slower_from.get(arguments[-1], self.slowness)
            self.now_s += self.slowness * STEP_S
            return step(*arguments)

        def slow_validate(*arguments: Any) -> Any:
            self.now_s += self.slowness * VALIDATION_STEP_S
            return validate(*arguments)

        TrainingState.step, SmallTask.validate = slow_step, slow_validate  # type: ignore[method-assign]
        Job.elapsed_s = lambda job: job.elapsed_before_s + self.now_s  # type: ignore[method-assign]
        try:
            return super().train(stop_at)
        finally:
            TrainingState.step, SmallTask.validate, Job.elapsed_s = step, validate, elapsed_s  # type: ignore[method-assign]


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _before_step(number: int) -> None:
    step = TrainingState.step

    def dying_step(self: Any, batch: Any, lr: float, samples: int, global_step: int) -> Any:
        if global_step == number:
            kill()
        return step(self, batch, lr, samples, global_step)

    TrainingState.step = dying_step  # type: ignore[method-assign]


def _before_commit() -> None:
    save = checkpoint_writer.save_checkpoint

    def dying_save(folder: Path, position: Position, **contents: Any) -> Path:
        if position.global_step == DECISION:
            kill()
        return save(folder, position, **contents)

    checkpoint_writer.save_checkpoint = dying_save


def _before_event() -> None:
    write = task_log.TaskLog.write

    def dying_write(self: Any, kind: str, **fields: Any) -> None:
        if kind == "decay":
            kill()
        write(self, kind, **fields)

    task_log.TaskLog.write = dying_write  # type: ignore[method-assign]


KILLS: dict[str, Callable[[], None]] = {
    "before": lambda: _before_step(DECISION - 1),
    "at-before-commit": _before_commit,
    "at-before-event": _before_event,
    "after": lambda: _before_step(DECISION),
    "in-the-decay": lambda: _before_step(DECISION + 6),
    "in-the-last-epoch": lambda: _before_step(7 * STEPS - 1),
}


def _in_child(work: Callable[[], Any]) -> int:
    """Run in a forked process, which is safe as this one computes nothing; returns its wait status."""
    pid = os.fork()
    if pid == 0:
        work()
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def main(folder: Path) -> None:
    for name, inject in KILLS.items():

        def killed(name: str = name, inject: Callable[[], None] = inject) -> None:
            inject()
            SimulatedRun(folder / name, SLOW).train()

        assert os.WTERMSIG(_in_child(killed)) == signal.SIGKILL, name
        assert _in_child(lambda name=name: SimulatedRun(folder / name, SLOW).train()) == 0, name


if __name__ == "__main__":
    main(Path(sys.argv[1]))
