"""Learning rate as a function of the step, and the decay with which a run ends."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pillsnap.config import ClassificationSettings, DetectionSettings, TrainSettings
from pillsnap.data.plan import StreamPlan
from pillsnap.runs.checkpoint import Position


@dataclass(frozen=True)
class Decay:
    """The decay of the schedule `wsd`."""

    first_step: int
    """Optimizer steps before it."""
    end_step: int
    """Optimizer steps up to its end, with which training ends."""
    end_epoch: int
    """The last epoch of the run, from 1: the one validated after `end_step`."""
    reason: str
    """`planned`, `budget` or `patience`."""
    peak: float = 1.0
    """Learning rate at its first step, as a share of the setting."""


class Schedule:
    """Linear warm-up, then half a cosine, or constant until the decay, which may be brought forward.

    The cosine: Loshchilov and Hutter, "SGDR", 2017, without restarts. `wsd`: Hägele et al., "Scaling laws and
    compute-optimal training beyond fixed training durations", 2024; its decay is 1 - sqrt.
    """

    def __init__(
        self,
        plan: StreamPlan,
        task: DetectionSettings | ClassificationSettings,
        train: TrainSettings,
        independent_epochs: int,
        resumed_step: int,
        progress: dict[str, Any],
    ) -> None:
        """`independent_epochs`: the first epochs whose samples and model do not depend on the number of epochs.
        `progress` is that of the checkpoint after `resumed_step` steps.
        """
        self._plan, self._task, self._patience, self._share = plan, task, train.patience, train.decay_share
        self.warmup_steps = round(task.warmup_epochs * plan.train_steps)
        self._limit_of = {"patience": train.patience, "budget": train.time_budget_minutes}
        self._num_worse = int(progress.get("num_worse", 0))
        self.decay: Decay | None = None
        self.branch_step = 0
        """Steps up to which a run of more epochs is the same; 0 when it differs from the start."""
        if train.schedule == "cosine":
            return
        steps = plan.epochs * plan.train_steps
        self.decay = Decay(self.decay_start(steps), steps, plan.epochs, "planned")
        if self.warmup_steps <= self.decay.first_step:
            self.branch_step = min(self.decay.first_step, independent_epochs * plan.train_steps)
        else:
            self.warmup_steps = self.decay.first_step  # a run of one or two epochs
        early = progress.get("decay")
        # A decay that has not begun is dropped when a setting that it followed from has changed.
        if early and (early["first_step"] < resumed_step or progress["from"] == self._from(early["reason"])):
            whole = {"end_step": early["end_epoch"] * plan.train_steps}  # older checkpoints do not name it
            self.decay, self.branch_step = Decay(**whole | early), progress["branch_step"]

    @property
    def end_epoch(self) -> int:
        """The run's last epoch, from 1."""
        return self.decay.end_epoch if self.decay else self._plan.epochs

    @property
    def end_step(self) -> int:
        """Steps of the run."""
        return self.decay.end_step if self.decay else self._plan.epochs * self._plan.train_steps

    @property
    def ends_between_validations(self) -> bool:
        """Whether training ends before the last step of `end_epoch`: the time budget holds no whole epoch more."""
        return self.end_step < self.end_epoch * self._plan.train_steps

    def decay_start(self, end_step: int) -> int:
        """Steps before the decay of a run that is planned with `end_step` steps."""
        return end_step - max(1, round(self._share * end_step))

    def decays(self, step: int) -> bool:
        """Whether the decay has begun after `step` steps."""
        return self.decay is not None and step >= self.decay.first_step

    def place_in_decay(self, step: int) -> tuple[int, int]:
        """The number of the step in the decay, from 0, and the number of steps of the decay."""
        assert self.decay is not None
        return step - self.decay.first_step, self.decay.end_step - self.decay.first_step

    def lr(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        base, final = self._task.lr, self._task.final_lr_fraction
        if step < self.warmup_steps and not self.decays(step):
            return base * (step + 1) / self.warmup_steps
        if self.decay is None:
            total = self._plan.epochs * self._plan.train_steps
            progress = min(1.0, (step - self.warmup_steps) / max(1, total - self.warmup_steps))
            return base * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress)))
        if not self.decays(step):
            return base
        number, num_steps = self.place_in_decay(step)
        progress = min(1.0, number / max(1, num_steps))
        return base * self.decay.peak * (final + (1 - final) * (1 - math.sqrt(progress)))

    def end_early(self, step: int, end_step: int, reason: str) -> None:
        """Begin the decay after `step` steps, or shorten the one that has begun, to end after `end_step`; when that has
        passed, at once if a validation follows, else after one more step.
        """
        plan, end_step = self._plan, max(end_step, step)
        end_epoch = next(n for n in range(-(-end_step // plan.train_steps), plan.epochs + 1) if plan.validates(n - 1))
        if end_step == step < end_epoch * plan.train_steps:
            end_step += 1
        self.decay = Decay(step, end_step, end_epoch, reason, self.lr(step) / self._task.lr)
        self.branch_step = min(self.branch_step, step)

    def ends(self, position: Position) -> list[int]:
        """The steps with which a task at `position` can end: those before a validation."""
        epochs = [n for n in range(position.epoch + 1, self.end_epoch + 1) if self._plan.validates(n - 1)]
        return [min(n * self._plan.train_steps, self.end_step) for n in epochs]

    def validated(self, position: Position, best: bool) -> bool:
        """Count a validation at the end of an epoch; begin the decay when `patience` of them were not better. Returns
        whether it begins.
        """
        self._num_worse = 0 if best else self._num_worse + 1
        step = position.global_step
        if self.decay is None or self._patience is None or self._num_worse < self._patience or self.decays(step):
            return False
        # The decay has at least its share of all steps, as if the run had been planned so.
        self.end_early(step, next(end for end in self.ends(position) if self.decay_start(end) >= step), "patience")
        return True

    @property
    def progress(self) -> dict[str, Any]:
        """Kept in checkpoints; empty for the cosine."""
        if self.decay is None:
            return {}
        kept: dict[str, Any] = {"num_worse": self._num_worse}
        if self.decay.reason != "planned":
            kept |= {"decay": vars(self.decay), "from": self._from(self.decay.reason), "branch_step": self.branch_step}
        return {"schedule": kept}

    @property
    def meta(self) -> dict[str, Any]:
        """What a checkpoint says without being loaded; empty for the cosine."""
        if self.decay is None:
            return {}
        facts = {"branch_step": self.branch_step, "ends_between_validations": self.ends_between_validations}
        return {"schedule": facts | vars(self.decay)}

    def decay_facts(self) -> dict[str, Any]:
        """Fields of the `decay` event, besides its position."""
        assert self.decay is not None
        _, num_steps = self.place_in_decay(self.decay.first_step)
        return {
            "reason": self.decay.reason,
            "end_epoch": self.decay.end_epoch,
            "planned_epochs": self._plan.epochs,
            "num_steps": num_steps,
            "share": num_steps / self.decay.end_step,
        }

    def _from(self, reason: str) -> list[Any]:
        return [self._plan.epochs, self._limit_of[reason]]
