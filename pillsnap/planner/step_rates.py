"""Rates of training steps of the models to choose from, on this machine or reckoned for another GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from pillsnap.config import Settings
from pillsnap.errors import UserError
from pillsnap.models.precision import this_device
from pillsnap.planner.cards import CARDS, card_of, speed_ratios
from pillsnap.planner.measure import StepRates, measure_steps
from pillsnap.planner.steps_file import ARITHMETIC_SHARE, MeasuredStep, read_steps, step_for

# From fast to accurate. The model of the settings is always measured.
ALTERNATIVES: dict[str, tuple[tuple[str, int], ...]] = {
    "detection": (("yolo11n", 416), ("yolo11n", 640), ("yolo11s", 640), ("yolo11m", 640)),
    "classification": (("resnet18", 160), ("tf_efficientnetv2_b0", 224), ("tf_efficientnetv2_s", 224),
                       ("tf_efficientnetv2_s", 300), ("tf_efficientnetv2_m", 300)),
}  # fmt: skip
_CPU_BATCH = 2
Choices = dict[str, dict[tuple[str, int], tuple[StepRates, StepRates]]]
"""Rates by task, then by model and size: the slower and the faster estimate."""


@dataclass(frozen=True)
class Target:
    """The machine to plan for, where it is not this one."""

    card: str
    """A key of CARDS."""
    steps_file: Path | None = None
    """File of measured steps; None: this machine's GPU, without one the file that the package ships."""


def step_rates(
    settings: Settings, codes: list[str], seconds: float, alternatives: bool, say: Callable[[str], None],
    target: Target | None,
) -> tuple[Choices, list[str]]:  # fmt: skip
    """The rates of each task's models on the target, and notes about their sources."""
    if target and (target.steps_file or this_device(settings.train.device).type == "cpu"):
        return _from_file(settings, target)
    device = device_name(settings)
    ratios, notes = (1.0, 1.0), [f"steps: measured on this machine's {device}"]
    if target:
        ratios = speed_ratios(target.card, card_of(device))
        notes.append(_scaling(target.card, card_of(device)))
    choices: Choices = {name: {} for name in settings.tasks}
    for name in settings.tasks:
        own = (getattr(settings, name).model, getattr(settings, name).image_size_px)
        models = dict.fromkeys([*(ALTERNATIVES[name] if alternatives else ()), own])
        for model, size_px in models:
            say(f"{name}: measuring {model} at {size_px} px")
            try:
                rates = measure_choice(settings, codes, name, model, size_px, seconds)
            except UserError as error:
                say(f"{name}: {model} at {size_px} px cannot be measured: {error}")
                continue
            slow, fast = (rates.times(ratio) for ratio in ratios)
            choices[name][model, size_px] = slow, fast
    return choices, notes


def _from_file(settings: Settings, target: Target) -> tuple[Choices, list[str]]:
    steps, compiled = read_steps(target.steps_file), settings.train.compile != "off"
    choices: Choices = {}
    notes = []
    for name in settings.tasks:
        batch_size = getattr(settings, name).batch_size
        step = step_for(steps, name, getattr(settings, name), target.card, compiled=compiled)
        alike = [s for s in steps if (s.task, s.device, s.batch_size, s.compiled)
                 == (name, step.device, step.batch_size, compiled)]  # fmt: skip
        rates = [(one.on(target.card, batch_size), one) for one in alike]
        rates.sort(key=lambda pair: -pair[0][0].train_images_per_s)  # the slower, the more accurate
        choices[name] = {(one.model, one.image_size_px): both for both, one in rates}
        whole = f"{1000 * step.batch_size / step.images_per_s:.0f} ms a step of {step.batch_size}"
        part = "all of it scaled, as if the GPU limited it" if step.busy_ms is None else (
            f"of which the GPU works {step.busy_ms:.0f} ms, scaled, in validation half as "
            "long; the host is taken as fast as there"
        )  # fmt: skip
        if step.batch_size != batch_size:
            part += f", and a step of {batch_size} as so many images and one launch"
        notes.append(f"{name} steps: {step.model} on {step.device}, {whole}, {part} ({step.source})")
        notes.append(_roofline(step, target.card) if step.forward_gflop and step.busy_ms
                     else _scaling(target.card, card_of(step.device)))  # fmt: skip
    return choices, list(dict.fromkeys(notes))


def _scaling(there: str, here: str) -> str:
    (one, other), (slow, fast) = (CARDS[there], CARDS[here]), speed_ratios(there, here)
    return (
        f"{there} against {here}: {slow:.2f} to {fast:.2f} times as fast, by bfloat16 arithmetic "
        f"({one.tflops:.0f} to {other.tflops:.0f} TFLOPS) and bandwidth ({one.bandwidth_gb_s:.0f} to "
        f"{other.bandwidth_gb_s:.0f} GB/s); the slower decides"
    )


def _roofline(step: MeasuredStep, card: str) -> str:
    there, here, (slow, _) = CARDS[card], CARDS[card_of(step.device)], step.ratios(card)
    limit = "arithmetic" if slow < 0.999 * there.bandwidth_gb_s / here.bandwidth_gb_s else "bandwidth"
    return (
        f"{step.task}: {card} against {card_of(step.device)}: {slow:.2f} times as fast, by {limit} "
        f"({there.bandwidth_gb_s:.0f} to {here.bandwidth_gb_s:.0f} GB/s; arithmetic is taken to reach "
        f"{100 * ARITHMETIC_SHARE:.0f} % of {there.tflops:.0f} TFLOPS)"
    )


def measure_choice(
    settings: Settings, codes: list[str], name: str, model: str, image_size_px: int, seconds: float
) -> StepRates:
    """Rates of a task with another model and input size, from random weights."""
    from pillsnap.tasks.registry import make_task

    task_settings = getattr(settings, name).model_copy(update={"model": model, "image_size_px": image_size_px})
    task = make_task(name, settings.model_copy(update={name: task_settings}), codes, untrained=True)
    device = this_device(settings.train.device)
    batch_size = task_settings.batch_size if device.type == "cuda" else min(task_settings.batch_size, _CPU_BATCH)
    return measure_steps(
        task, settings.train, device, batch_size=batch_size, seconds=seconds, num_classes=max(len(codes), 1)
    )


def device_name(settings: Settings) -> str:
    device = this_device(settings.train.device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
