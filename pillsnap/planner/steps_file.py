"""Steps measured on a GPU, kept in a JSON file, and what they would take on another card."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from pillsnap.config import ClassificationSettings, DetectionSettings
from pillsnap.errors import UserError
from pillsnap.planner.cards import CARDS, card_of, speed_ratios
from pillsnap.planner.measure import StepRates

ARITHMETIC_SHARE = 0.4
"""Share of a card's peak arithmetic that a convolutional network's training is taken to reach."""
_HOST_BOUND = 0.9


class MeasuredStep(BaseModel):
    """One model's training step on one GPU."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    device: str
    """Name of the GPU."""
    source: str
    """Where and when it was measured."""
    task: str
    model: str
    image_size_px: int
    batch_size: int
    compiled: bool
    images_per_s: float = Field(gt=0)
    """Training rate of the model alone, on one repeated batch."""
    validation_images_per_s: float = Field(gt=0)
    first_step_s: float = Field(ge=0)
    """Seconds of the first step, with compilation if the step is compiled."""
    peak_memory_bytes: int | None = None
    busy_ms: float | None = Field(default=None, gt=0)
    """Milliseconds per step in which the GPU works; null where it was not profiled."""
    launches: float | None = None
    """Kernels and copies per step."""
    forward_gflop: float | None = Field(default=None, gt=0)
    """Billions of floating-point operations of one image's forward pass; a training step takes three times as many."""

    def on(self, card: str, batch_size: int) -> tuple[StepRates, StepRates]:
        """The rates on another card: the lower, which decides, and the higher estimate.

        Only the GPU's part of a step is scaled, and grows with the batch. Where the host limits the step, it takes as
        long per step on the other card.
        """
        busy_s = None if self.busy_ms is None else self.busy_ms / 1000
        step_s = self.batch_size / self.images_per_s
        busy_share = 1.0 if busy_s is None else busy_s / step_s
        host_s = step_s if busy_share < _HOST_BOUND else 0.0
        val_s = 1 / self.validation_images_per_s
        # Without a backward pass, the GPU works for less than half of a training step.
        val_busy_s = val_s if busy_s is None else min(val_s, busy_s / self.batch_size / 2)
        val_host_s = val_s if val_busy_s < _HOST_BOUND * val_s else 0.0
        slow, fast = (
            StepRates(
                1 / max(busy_share * step_s / self.batch_size / ratio, host_s / batch_size),
                1 / max(val_busy_s / ratio, val_host_s),
                self.peak_memory_bytes,
                self.first_step_s,
            )
            for ratio in self.ratios(card)
        )
        return slow, fast

    def ratios(self, card: str) -> tuple[float, float]:
        """Speed of `card` as a multiple of this device's while the GPU works: the lower and the higher estimate.

        A roofline (Williams et al., 2009): a step takes as long as its memory traffic or its arithmetic, whichever is
        longer. The traffic is taken as what limits it on this device, since its arithmetic is far from the peak; the
        arithmetic as ARITHMETIC_SHARE of the other card's peak, or all of it. Where operations or working time are not
        known, the published ratios of arithmetic and bandwidth are the two estimates.
        """
        one, other = CARDS[card], CARDS[card_of(self.device)]
        if self.forward_gflop is None or self.busy_ms is None:
            return speed_ratios(card, card_of(self.device))
        tflop = 3 * self.forward_gflop * self.batch_size / 1000
        times = (tflop / (share * one.tflops) / (self.busy_ms / 1000) for share in (ARITHMETIC_SHARE, 1.0))
        slow, fast = (1 / max(time, other.bandwidth_gb_s / one.bandwidth_gb_s) for time in times)
        return slow, fast


def read_steps(path: Path | None) -> list[MeasuredStep]:
    """The steps of a file, or those that the package ships. Raises UserError for a file that holds none."""
    try:
        text = path.read_bytes() if path else (resources.files("pillsnap.planner") / "steps.json").read_bytes()
        return TypeAdapter(list[MeasuredStep]).validate_json(text)
    except FileNotFoundError:
        raise UserError(f"There is no file {path}: give --steps a file of measured steps, or leave it out.") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"--steps {path}: {where}: {first['msg']}; there must be a list of measured steps.") from None


def step_for(
    steps: Sequence[MeasuredStep], task: str, settings: DetectionSettings | ClassificationSettings, card: str,
    *, compiled: bool,
) -> MeasuredStep:  # fmt: skip
    """The step from which that of a task's model, size and batch on `card` is reckoned: of this batch, or of another
    where the GPU's part of it is known; such steps first, then those of cards of a like speed. Raises UserError when
    there is none: the time of another model or size is not guessed.
    """
    size_px, batch_size = settings.image_size_px, settings.batch_size
    own = [
        step for step in steps
        if (step.task, step.model, step.image_size_px, step.compiled) == (task, settings.model, size_px, compiled)
        and (step.batch_size == batch_size or step.busy_ms is not None)
    ]  # fmt: skip
    if not own:
        known = dict.fromkeys(f"{s.model} {s.image_size_px} px batch {s.batch_size}" for s in steps if s.task == task)
        raise UserError(
            f"There is no measured step of {settings.model} at {size_px} px with a batch of {batch_size} for {task} "
            f"(there are: {', '.join(known) or 'none'}): run `pillsnap plan` on a machine with a GPU, give --steps a "
            "file that has it, or choose one of these."
        )

    def distance(step: MeasuredStep) -> tuple[bool, bool, float]:
        ratios = speed_ratios(card, card_of(step.device))
        return step.busy_ms is None, step.batch_size != batch_size, sum(abs(math.log(ratio)) for ratio in ratios)

    return min(own, key=distance)
