"""Measures the rate of a task, says how many epochs fit into its time budget, and when the decay has to begin."""

from __future__ import annotations

from collections import deque
from typing import Any

from pillsnap.errors import UserError
from pillsnap.runs.checkpoint import Position
from pillsnap.train.job import Job
from pillsnap.train.schedule.lr_schedule import Schedule
from pillsnap.train.task_log import TaskLog

_WINDOW_STEPS, _WINDOW_SHARE = 20, 0.05
"""The rate is that of the last steps: at least so many, and as many as fill that share of the budget."""
_FEWEST_STEPS = 2
_FIRST_S, _FIRST_SHARE = 60.0, 0.01
"""How long the rate is measured first: seconds, or that share of the budget if it is less."""
_MARGIN = 1.05
_EVALUATION_MARGIN = 2.0
"""The evaluation takes whole photos through both models, which validation does not."""
_LEAST_JUDGED_S = 0.01
"""Seconds a photo that the evaluation at least takes: the model's process cuts crops and reports them photo by photo
while the GPU waits (an H200 with slow cores judged 180 photos/s, benchmarks/log/gpu.md).
"""
_RESTART_S = 30.0
"""What it takes to start the workers again, for a validation that follows no whole epoch."""
_RESERVE = 0.02
"""Share of the budget for starts, exports and the report."""
TOO_SMALL = -1


class BudgetClock:
    """Measures a task on rank 0, which decides for all workers. Without a budget nothing is decided."""

    def __init__(self, job: Job, log: TaskLog) -> None:
        self._job, self._log = job, log
        self._budget = job.budget if job.events is not None else None
        self._last_s: float | None = None
        rates: list[Any] = (job.resume.meta.get("rates") if job.resume else None) or [None, 0.0]
        self._earlier_step_s: float | None = rates[0]
        self._validated_s: float = rates[1]
        self._step_s_then: float | None = rates[2] if len(rates) > 2 else None  # older checkpoints have two
        self._trained_s = 0.0
        self._marks = deque[float]()
        self._told: tuple[int, int] | None = None

    def step(self) -> None:
        """Count a training step. The first one after a start, which may compile, is not measured."""
        now_s = self._job.elapsed_s()
        if self._budget and self._last_s is not None:
            self._trained_s += now_s - self._last_s
            self._marks.append(self._trained_s)
            window_s = _WINDOW_SHARE * self._budget.total_s
            while len(self._marks) > _WINDOW_STEPS + 1 and self._trained_s - self._marks[1] > window_s:
                self._marks.popleft()
        self._last_s = now_s

    def validated(self) -> None:
        """Count a validation with the checkpoint after it."""
        now_s = self._job.elapsed_s()
        if self._last_s is not None:
            self._validated_s = now_s - self._last_s
            self._step_s_then = self._step_s if self._has_rate else None
        self._last_s = now_s

    def end_step(self, position: Position, schedule: Schedule) -> int:
        """The step with which the decay has to end if it must begin or be shortened now, else 0. TOO_SMALL when the
        budget does not hold warm-up and decay.

        It ends before a validation. When none can be reached in time, because the machine has slowed down, it ends
        where the time does, and the validation gets a start of its own.
        """
        if not self._has_rate:
            return 0
        step, ends = position.global_step, schedule.ends(position)
        decays = schedule.decays(step)
        left_s = self.allowed_s - self._job.elapsed_s()
        step_s, validation_s, margin, fitting = self._step_s, self._validation_s, 1.0 if decays else _MARGIN, 0
        for num_validations, end in enumerate(ends, 1):
            restart_s = _RESTART_S if end == schedule.end_step and schedule.ends_between_validations else 0.0
            if margin * ((end - step) * step_s + num_validations * validation_s) + restart_s > left_s:
                break
            fitting = end
        if (
            self._told is None
            and step <= schedule.warmup_steps
            and schedule.decay_start(fitting) < max(schedule.warmup_steps, 1)
        ):
            return TOO_SMALL
        end = fitting or ends[0]
        fewest_steps = 1 if decays else (end - schedule.decay_start(end)) / 2
        if not fitting or (end - step < fewest_steps and end < schedule.end_step):
            # No validation can be reached in time with a decay before it.
            num_steps = int((left_s - _RESTART_S - validation_s) / (_MARGIN * step_s))
            between = step + max(1, num_steps)
            if fitting:
                end = max(end, min(between, ends[ends.index(end) + 1]))
            elif (end - step) * step_s > _RESTART_S:
                end = min(end, between)
        self._tell(position, schedule, end, left_s)
        must = end < schedule.end_step and (decays or step >= schedule.decay_start(end))
        return end if must else 0

    @property
    def allowed_s(self) -> float:
        """Seconds that the task may take, from its first attempt on."""
        budget = self._budget
        assert budget is not None
        after_s = _RESERVE * budget.total_s + self._judging_s
        return (budget.total_s - budget.spent_s - after_s) * budget.share

    @property
    def _judging_s(self) -> float:
        """What the evaluation takes."""
        budget, plan = self._budget, self._job.plan
        assert budget is not None
        judging_s = budget.judging_s + budget.num_judged * self._validation_s / max(plan.num_val, 1)
        return max(_EVALUATION_MARGIN * judging_s, _LEAST_JUDGED_S * budget.num_judged)

    def refuse(self) -> UserError:
        """The error of a budget that is too small; the figures are known on rank 0."""
        name, budget, figures = self._job.task.name, self._budget, ""
        if budget is not None:
            figures = (
                f" ({max(0.0, self.allowed_s - self._job.elapsed_s()):,.0f} of {budget.total_s:,.0f} s, of which "
                f"{self._judging_s:,.0f} s are kept for the evaluation of {budget.num_judged:,} photos)"
            )
        return UserError(
            f"train.time_budget_minutes is too small for {name} on this machine: warm-up and decay alone take longer "
            f"than the time left for it{figures}. Raise it, set it to null, or lower {name}.warmup_epochs or its work "
            "per epoch."
        )

    @property
    def meta(self) -> dict[str, Any]:
        """Kept in checkpoints, so that a resumed task knows its rates; empty while there are none."""
        return {"rates": [self._step_s, self._validated_s, self._step_s_then]} if self._has_rate else {}

    @property
    def _step_s(self) -> float:
        if not self._has_own_rate and self._earlier_step_s is not None:
            return self._earlier_step_s
        return (self._marks[-1] - self._marks[0]) / (len(self._marks) - 1)

    @property
    def _validation_s(self) -> float:
        """Until the first, the forward passes of its steps; later, longer by as much as steps have become slower."""
        if not self._validated_s:
            return self._step_s * self._job.plan.val_steps / 3
        return self._validated_s * max(1.0, self._step_s / (self._step_s_then or self._step_s))

    @property
    def _has_own_rate(self) -> bool:
        first_s = min(_FIRST_S, _FIRST_SHARE * self._budget.total_s) if self._budget else 0.0
        return len(self._marks) > _FEWEST_STEPS and self._trained_s >= first_s

    @property
    def _has_rate(self) -> bool:
        return self._budget is not None and (self._has_own_rate or self._earlier_step_s is not None)

    def _tell(self, position: Position, schedule: Schedule, end: int, left_s: float) -> None:
        """An event when the number of epochs that fit is known, and at most once per epoch when it has changed."""
        if self._told is not None and (self._told[0] == position.epoch or self._told[1] == end):
            return
        self._told = (position.epoch, end)
        step, first_step = position.global_step, schedule.decay_start(end)
        self._log.write(
            "budget", epoch=position.epoch + 1, step=step, planned_epochs=self._job.plan.epochs,
            epochs_fitting=end // self._job.plan.train_steps, decay_step=first_step if step < first_step else step,
            allowed_s=self.allowed_s, left_s=left_s, step_s=self._step_s, validation_s=self._validation_s,
        )  # fmt: skip
