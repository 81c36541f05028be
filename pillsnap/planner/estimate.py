"""Estimates how long a stage takes on this machine or with another GPU, what limits it, and what fits its budget."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pillsnap.config import Settings
from pillsnap.errors import UserError
from pillsnap.planner.loader_rates import measure_task_loader, sample_run, with_whole_epochs
from pillsnap.planner.measure import LoaderRates, StepRates
from pillsnap.planner.step_rates import Target, device_name, step_rates
from pillsnap.planner.times import (
    START_S,
    Counts,
    Passes,
    TaskEstimate,
    epochs_within,
    evaluation_s,
    largest_within,
    total_s,
)
from pillsnap.runs.directory import Run

_PILLS_PER_COMBINATION = 3
_ALL_PHOTOS = 500_000


def expected_counts(settings: Settings) -> dict[str, Counts]:
    """Samples per task of a manifest that is yet to be built from these settings."""
    sampling = settings.sampling
    photos = sampling.num_photos or _ALL_PHOTOS
    combinations = photos * sampling.combination_fraction
    counts = {}
    for name, pills in (("detection", 1), ("classification", _PILLS_PER_COMBINATION)):
        number = round(photos + (pills - 1) * combinations)
        val = round(number * sampling.val_fraction)
        counts[name] = Counts(number - val, val, round(pills * combinations * (1 - sampling.val_fraction)))
    return counts


def estimate(
    settings: Settings, run: Run | None, *, seconds: float, alternatives: bool, say: Callable[[str], None],
    target: Target | None = None, cores: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure and compute everything that `pillsnap plan` prints. Ray must be initialised.

    `run`: the manifest to plan for; None: counts come from the settings and photos are generated. Each measurement
    takes about `seconds`. `target`: another GPU than this machine's; `cores`: another number of CPU cores.
    """
    limits_s = (settings.targets.total_time_s, 60 * (settings.train.time_budget_minutes or 0))
    budget_s = min(filter(None, limits_s), default=None)
    codes = [f"K-{n:06}" for n in range(len(run.codes) if run else settings.sampling.num_classes or 4_500)]
    # Steps come first: what is missing in a file is known at once.
    steps, notes = step_rates(settings, codes, seconds, alternatives, say, target)
    here = os.cpu_count() or 1
    if cores:
        notes.append(f"loader: measured here on {here} cores, taken as {cores / here:.2g} times as fast on {cores}")
    with tempfile.TemporaryDirectory(prefix="pillsnap-plan-") as folder:
        measured = run
        if measured is None:
            say("there is no manifest: measuring on generated photos")
            measured = sample_run(settings, Path(folder))
        counts = expected_counts(settings) if run is None else _counts(run)
        loaders = {}
        for name in settings.tasks:
            say(f"{name}: measuring the loader")
            rates = measure_task_loader(measured, name, seconds, Path(folder, "store"))
            factor = (cores or here) / here
            loaders[name] = LoaderRates(rates.direct * factor, rates.stored * factor)

    def task_estimate(name: str, model: str, size_px: int, rates: StepRates) -> TaskEstimate:
        passes = Passes.of(getattr(settings, name), counts[name])
        return TaskEstimate(name, model, size_px, counts[name], passes, rates, loaders[name])

    choices = {
        name: [task_estimate(name, model, size_px, rates[0]) for (model, size_px), rates in steps[name].items()]
        for name in settings.tasks
    }
    own = {name: (getattr(settings, name).model, getattr(settings, name).image_size_px) for name in settings.tasks}
    chosen = [one for name in own for one in choices[name] if (one.model, one.image_size_px) == own[name]]
    if len(chosen) < len(own):
        raise UserError("The models of the settings cannot be measured on this machine, so there is nothing to plan.")
    fastest = [task_estimate(name, *own[name], steps[name][own[name]][1]) for name in own]
    total = total_s(chosen)
    fitting = largest_within(choices, budget_s) if budget_s else None
    return {
        "device": target.card if target else device_name(settings),
        "from_manifest": run is not None,
        "tasks": [task.to_dict() for task in chosen],
        "judgement_s": evaluation_s(chosen),
        "total_s": total,
        "fastest_total_s": total_s(fastest),
        "budget_s": budget_s,
        "fits": None if budget_s is None else total <= budget_s,
        "epochs_within_budget": epochs_within(chosen, budget_s) if budget_s else None,
        "alternatives": [task.to_dict() for tasks in choices.values() for task in tasks] if alternatives else [],
        "largest_within_budget": [task.to_dict() for task in fitting] if fitting else None,
        "assumptions": [*notes, *_assumptions(settings)],
    }


def _assumptions(settings: Settings) -> list[str]:
    store = "the decode-once store is off: every sample is read from its photo"
    if settings.data.store != "off":
        store = "a sample's first pass reads its photo, all later ones the decode-once store"
    lines = [store, f"{START_S:.0f} s to start each task and the evaluation; compiling takes the first step's time"]
    if settings.train.time_budget_minutes:
        lines.append(
            f"train.time_budget_minutes ends the run within {settings.train.time_budget_minutes:g} min, its decay done"
        )
    return lines


def _counts(run: Run) -> dict[str, Counts]:
    from pillsnap.data.fill_store import split_stores, store_folder
    from pillsnap.tasks.registry import make_task

    kinds = dict(zip(run.manifest["sample_id"].to_pylist(), run.manifest["image_type"].to_pylist(), strict=True))
    counts = {}
    for name in run.settings.tasks:
        task = make_task(name, run.settings, run.codes)
        samples = task.samples(run.manifest, None)
        whole = make_task(name, with_whole_epochs(run.settings), run.codes).samples(run.manifest, None)
        photos = samples.train["photo_id" if name == "classification" else "sample_id"].to_pylist()
        stored, data = 0.0, run.settings.data
        if data.store != "off":
            recipe, folder = task.recipe(samples), store_folder(data.store_dir, run.where)
            store = split_stores(folder, name, recipe, data.store, run.manifest_hash, read_only=True)["train"]
            stored = float(store.shards.stored(recipe.keys(samples.train)).mean())
        combinations = sum(kinds[photo] == "combination" for photo in photos)
        counts[name] = Counts(len(samples.train), len(whole.val), combinations, stored)
    return counts
